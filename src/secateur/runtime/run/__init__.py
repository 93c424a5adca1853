"""Chains and decoder steps installed in a model, and what their modules do when called."""
