"""What tests of sparse programs share."""

import inspect

import pytest


@pytest.fixture
def measured(monkeypatch):
    """Every sparse layer counts as faster, so that tests depend on no clock."""
    from secateur.deploy.onnx_graph import sparse

    real = sparse.pack_worthy

    def unmeasured(*given, **options):
        call = inspect.signature(real).bind(*given, **options)
        call.arguments["measure"] = False
        return real(*call.args, **call.kwargs)

    monkeypatch.setattr(sparse, "pack_worthy", unmeasured)
