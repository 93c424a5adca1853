"""What tests of the sparse runtime share: calls of the kernels that are counted."""

from collections import Counter

import pytest


@pytest.fixture
def calls(monkeypatch):
    """How often each function of the kernels is called by the operators of torch."""
    from secateur.kernels.native import load_native
    from secateur.runtime.layers import operators

    count, real = Counter(), load_native()

    class Counting:
        def __getattr__(self, name):
            count[name] += 1
            return getattr(real, name)

    monkeypatch.setattr(operators, "load_native", lambda: Counting())
    return count
