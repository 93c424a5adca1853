"""What tests of the sparse runtime share: a cache of their own, and calls of the kernels that are counted."""

from collections import Counter

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No measurement of another test or of the user is read."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


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
