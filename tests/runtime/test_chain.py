"""Blocks of an encoder as one call: what becomes a chain, and that it gives the same."""

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.native import load_native
from secateur.runtime import compile_model, saving
from secateur.runtime.layers import attention, operators
from secateur.runtime.run.chain import chains_of
from tests.runtime.blocks import Holder, added, chained, compiled, encoder, holder, text
from tests.runtime.checks import compare, compare_from_threads
from tests.torch import slow

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


@pytest.mark.parametrize(
    "name", ["bert", "vit", "dinov2", *slow("distilbert", "roberta", "deit", "siglip", "bart", "whisper")]
)
def test_encoders_run_as_one_call(name, calls):
    model, fast, example = compiled(encoder(name))
    assert fast.secateur_report.blocks == 2
    assert "2 blocks run as one call." in fast.secateur_report.summary()
    assert chained(calls, fast, model, example) == 1
    small = {name: value[:1] for name, value in example.items()}
    assert chained(calls, fast, model, small) == 1


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@pytest.mark.parametrize("threads", [1, 2])
def test_lengths_batches_and_padding(name, threads, calls):
    model, fast, _ = compiled(encoder(name))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (text(1, 1), text(1, 40), text(3, 17), text(3, 33, (0, 2)), text(1, 9, (0,))):
            assert chained(calls, fast, model, batch) == 1
        without = {"input_ids": text(2, 20)["input_ids"]}
        assert chained(calls, fast, model, without) == 1
    finally:
        torch.set_num_threads(before)


def test_a_mask_that_is_added_and_one_of_truth_values(calls):
    model, fast, example = compiled(holder(), added())
    assert fast.secateur_report.blocks == 3
    wide = torch.randn(3, 3, 11, 11)
    x = torch.randn(3, 11, 48)[..., ::2]
    for mask in (wide, wide[:1], wide[:, :1, :1], wide > 0, wide.transpose(2, 3), None):
        assert chained(calls, fast, model, {"x": x, "seen": mask}) == 1
    assert chained(calls, fast, model, {"x": x, "seen": wide[0, 0]}) == 0
    assert chained(calls, fast, model, {"x": x[:0], "seen": None}) == 1
    assert chained(calls, fast, model, {**example, "flag": True}) == 0


def test_nan_reaches_what_it_does_in_a_dense_model(calls):
    model, fast, batch = compiled(holder(), added())
    for value in (float("nan"), float("inf")):
        x = batch["x"].clone()
        x[1, 3, 5] = value
        assert chained(calls, fast, model, {"x": x, "seen": batch["seen"]}) == 1
        with torch.inference_mode():
            got = fast(x, batch["seen"])["last"]
        assert got[1].isnan().all()
        assert not got[0].isnan().any()


def test_weights_are_held_once():
    _, fast, _ = compiled(encoder("bert"))
    ((_, chain),) = ((m, m.chains[0]) for m in fast.modules() if hasattr(m, "chains"))
    kept = {t.data_ptr() for t in (*fast.parameters(), *fast.buffers())}
    assert all(part.data_ptr() in kept for part in chain.tensors())
    sizes = {layer.name: layer.packed_bytes for layer in fast.secateur_report.layers}
    layer = "bert.encoder.layer.0.output.dense"
    assert sizes[layer] == fast.get_submodule(layer).packed.nbytes


@pytest.mark.parametrize("name", ["bert", "dinov2", "plain"])
def test_saved_loaded_and_copied(name, calls, tmp_path):
    model, example, skeleton = (holder(), added(), Holder()) if name == "plain" else (encoder(name), None, None)
    model, fast, batch = compiled(model, example)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", skeleton)
    assert chains_of(again) == chains_of(fast)
    expected = compare(fast, model, batch)
    for other in (again, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compile_model.share_copy(fast)):
        before = calls["chain"]
        assert all(map(torch.equal, compare(other, model, batch), expected))
        assert calls["chain"] == before + 1
        assert type(other).__name__ == type(model).__name__


def test_without_kernels_a_saved_model_runs(tmp_path, monkeypatch):
    model, fast, batch = compiled(encoder("bert"))
    runtime.save(fast, tmp_path / "fast")
    for module in (saving, operators, attention):
        monkeypatch.setattr(module, "load_native", lambda: None)
    compare(runtime.load(tmp_path / "fast"), model, batch)


def test_damaged_chains_are_a_sentence(tmp_path):
    _, fast, _ = compiled(encoder("bert"))
    runtime.save(fast, tmp_path / "fast")
    path = tmp_path / "fast" / "runtime.json"
    manifest = json.loads(path.read_text())
    ((holder, (plan,)),) = manifest["chains"].items()
    first, *rest = plan["steps"]
    for change in (
        {"blocks": ["layer.7"]},
        {"steps": [{**first, "weight": "layer.0.gone.packed"}, *rest]},
        {"steps": [{**first, "reads": [5]}, *rest]},
        {"steps": [{**first, "bias": "layer.0.intermediate.dense.packed", "weight": first["bias"]}, *rest]},
        {"rows": 31},
        {"heads": 2},
        {"form": 3},
    ):
        path.write_text(json.dumps({**manifest, "chains": {holder: [{**plan, **change}]}}))
        with pytest.raises(ModelError, match=f"the chains of '{holder}' do not fit"):
            runtime.load(tmp_path / "fast")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit", "plain"])
def test_torch_compile_keeps_one_call(name, calls):
    plain = name == "plain"
    model, fast, batch = compiled(holder() if plain else encoder(name), added() if plain else None)
    torch.compiler.reset()
    graph = torch.compile(fast, backend="aot_eager", fullgraph=True)
    compare(graph, model, batch)
    assert chained(calls, graph, model, batch) == 1
    compare(fast, model, batch)


def test_two_threads_at_once(calls):
    model, fast, _ = compiled(holder(), added())
    calls.clear()
    compare_from_threads(fast, model, [added(2, 30), added(3, 9)])
    assert calls["chain"] == 20


def test_operator_passes_torch_checks_and_refuses_bad_calls():
    _, fast, batch = compiled(holder(), added())
    (chain,) = fast.chains
    call = [batch["x"], batch["seen"], chain.tensors(), chain.steps, chain.numbers, 3, 24]
    call[2] = [part.detach() for part in call[2]]
    torch.library.opcheck(operators.sparse_chain, tuple(call), test_utils=["test_schema", "test_faketensor"])
    damaged = chain.steps.clone()
    damaged[0, 7] = 99
    for place, value, error, match in (
        (0, batch["x"].double(), TypeError, "takes float32"),
        (0, batch["x"][0], ValueError, "takes .batch, tokens, width."),
        (0, batch["x"][..., 1:], ValueError, "do not fit together"),
        (2, call[2][:-1], ValueError, "not there, or too small"),
        (2, [part.long() for part in call[2]], TypeError, "parts of a chain"),
        (3, damaged, ValueError, "not there, or too small"),
        (3, chain.steps[:, 1:], ValueError, "takes .batch, tokens, width. and a table"),
        (5, 4, ValueError, "same heads"),
        (6, 23, ValueError, "do not fit together"),
    ):
        with pytest.raises(error, match=match):
            operators.sparse_chain(*call[:place], value, *call[place + 1 :])
