"""Blocks of an encoder as one call: what runs layer by layer instead, and why."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn

from secateur import runtime
from secateur.kernels.native import load_native
from secateur.runtime import compile_model
from secateur.runtime.layers.tuning import unmeasured
from secateur.runtime.run import install_chain
from tests.runtime.blocks import added, chained, compiled, encoder, holder, text
from tests.runtime.checks import compare

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


def test_hidden_states_and_attentions_are_those_of_the_layers(calls):
    for name, batch in (("bert", text(2, 9)), ("vit", None)):
        model, fast, example = compiled(encoder(name))
        batch = batch or example
        assert chained(calls, fast, model, {**batch, "output_hidden_states": True}) == 0
        with torch.inference_mode():
            assert len(fast(**batch, output_hidden_states=True).hidden_states) == 3
        assert chained(calls, fast, model, batch) == 1
        watched = next(m for m in fast.modules() if m._forward_hooks)
        handle = watched.register_forward_hook(lambda *_: None)
        assert chained(calls, fast, model, batch) == 0
        handle.remove()
        with torch.inference_mode():
            expected, got = (m(**batch, output_hidden_states=True).hidden_states for m in (model, fast))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model, fast, example = compiled(encoder("bert"))
    model.set_attn_implementation("eager")
    fast.set_attn_implementation("eager")
    assert chained(calls, fast, model, {**text(2, 9, (0,)), "output_attentions": True}) == 0


def test_a_model_that_has_shown_its_hidden_states_is_compiled_whole(calls):
    shown = encoder("bert")
    with torch.inference_mode():
        shown(**text(2, 9), output_hidden_states=True)
    assert any(module._forward_hooks for module in shown.modules())
    model, fast, _ = compiled(shown)
    assert fast.secateur_report.blocks == 2
    assert chained(calls, fast, model, text(2, 9)) == 1
    assert chained(calls, fast, model, {**text(2, 9), "output_hidden_states": True}) == 0


@pytest.mark.parametrize("way", ["early", "skip", "keep", "twice", "between", "mask"])
def test_other_ways_through_the_blocks(way, calls):
    model, fast, batch = compiled(holder(), added())
    model.way = fast.way = way
    compare(fast, model, batch)
    model.way = fast.way = "all"
    assert chained(calls, fast, model, batch) == 1


def test_streams_that_the_trace_keeps_end_a_chain(calls):
    model, fast, batch = compiled(holder("keep"), added())
    assert fast.secateur_report.blocks == 3
    assert chained(calls, fast, model, batch) == 3


def test_blocks_of_their_own_and_hooks(calls):
    model, fast, batch = compiled(holder(), added())
    with torch.inference_mode():
        calls.clear()
        got, expected = (m.blocks[0](batch["x"], seen=batch["seen"])[0] for m in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not calls["chain"]
    seen = []
    for place in (fast.blocks[1], fast.blocks[2].down):
        handle = place.register_forward_hook(lambda *_: seen.append(1))
        assert chained(calls, fast, model, batch) == 0
        handle.remove()
    assert len(seen) == 2
    assert chained(calls, fast, model, batch) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    assert chained(calls, fast, model, batch) == 0
    handle.remove()


def test_training_and_gradients(calls):
    model, fast, batch = compiled(holder(), added())
    fast.train()
    assert chained(calls, fast, model, batch) == 0
    fast.eval()
    calls.clear()
    with torch.no_grad():
        fast(**batch)
    assert calls["chain"] == 1
    with pytest.raises(RuntimeError, match="no backward"):
        fast(batch["x"].clone().requires_grad_(), batch["seen"])


def test_exchanged_modules_count(calls):
    model, fast, batch = compiled(holder(), added())
    for one in (model, fast):
        one.blocks[1].first = nn.Identity()
    assert chained(calls, fast, model, batch) == 0
    model, fast, batch = compiled(holder(), added())
    for one in (model, fast):
        one.blocks[1] = nn.Module()
        one.blocks[1].forward = lambda x, seen: (x, None)
    compare(fast, model, batch)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "encoder.block.0 reads more than one stream and one mask"),
        ("gpt2", ""),
        ("clip", "encoder.layers.0 computes mul.Tensor in encoder.layers.0.mlp.activation_fn"),
        ("albert", "encoder.albert_layer_groups.0 is called more than once"),
    ],
)
def test_other_blocks_are_left_alone(name, reason, calls):
    model, fast, example = compiled(encoder(name))
    report = fast.secateur_report
    assert (report.blocks, bool(report.apart)) == (0, bool(reason))
    assert reason in report.apart
    assert ("No blocks run as one call: " in report.summary()) == bool(reason)
    assert chained(calls, fast, model, example) == 0


def test_layers_that_stay_dense_split_a_chain(calls):
    model = holder()
    model.blocks[1].up.weight.data += 1
    fast = runtime.compile(model, measure=False, example=added())
    assert fast.secateur_report.blocks == 2
    assert "blocks.1 holds layers that stay dense" in fast.secateur_report.apart
    assert chained(calls, fast, model, added()) == 2


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_kept(faster, calls, monkeypatch):
    times = [2.0, 1.0 if faster else 3.0]
    monkeypatch.setattr(
        install_chain,
        "interleaved",
        lambda functions: [f() is None or t for f, t in zip(functions, times, strict=True)],
    )
    monkeypatch.setattr(
        compile_model, "choose", lambda array, *given, **options: unmeasured(array, tokens=32, value="float32")
    )
    model, fast, batch = compiled(holder(), added(), measure=True)
    assert fast.secateur_report.blocks == (3 if faster else 0)
    assert ("measured no faster as a chain" in fast.secateur_report.apart) != faster
    assert chained(calls, fast, model, batch) == faster


def test_a_chain_that_gives_something_else_is_dropped(monkeypatch):
    monkeypatch.setattr(install_chain, "TOLERANCE", -1.0)
    _, fast, _ = compiled(holder(), added())
    assert fast.secateur_report.apart == "blocks.0 gives another result as a chain"
