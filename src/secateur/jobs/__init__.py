"""Workflows that the command line calls: prune a classifier, sweep, train, answer, the demo."""
