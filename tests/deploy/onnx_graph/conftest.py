"""What tests of sparse programs share."""

import pytest


@pytest.fixture
def measured(monkeypatch):
    """Every sparse layer counts as faster, so that tests depend on no clock."""
    from secateur.deploy.onnx_graph import sparse

    pack = sparse.pack_worthy
    monkeypatch.setattr(sparse, "pack_worthy", lambda weight, **options: pack(weight, **{**options, "measure": False}))
