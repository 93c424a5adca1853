"""Tests of the PyTorch host, and what they share."""

import pytest


def slow(*names):
    """Families that are built like one of the fast tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]
