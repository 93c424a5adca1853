"""Workflows that the command line calls: prune a classifier, sweep, answer, the demo."""
