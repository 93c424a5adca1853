"""Runs pruned models on their own sparse CPU kernels."""
