"""Metrics of predictions, each as statistics with one line a row, and paired bootstrap intervals of drops."""
