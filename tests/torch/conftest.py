"""What tests of streamed runs share."""

import pytest

LAYOUTS = {}


@pytest.fixture
def traced_once(monkeypatch):
    """Tracing takes longer than pruning tiny models, so models of one config share a layout."""
    from secateur.torch.stream import lazy_model, run
    from secateur.torch.trace.derive import trace as real_trace

    def trace(model, example):
        key = (type(model), model.config.to_json_string(use_diff=False))
        if key not in LAYOUTS:
            LAYOUTS[key] = real_trace(model, example)
        return LAYOUTS[key]

    monkeypatch.setattr(run, "trace", trace)
    monkeypatch.setattr(lazy_model, "trace", trace)
