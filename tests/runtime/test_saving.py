"""Compiled models on disk: units may be gone, an output is never overwritten unasked, damage is a sentence."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import secateur
from secateur import runtime
from secateur.errors import ModelError, SecateurError
from secateur.kernels.native import load_native
from tests import zoo

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


def compiled(model, keep):
    host = secateur.open(model)
    host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.7))
    host.resize(secateur.Plan(keep))
    return runtime.compile(host.model, measure=False, tokens=16)


@pytest.mark.parametrize(
    ("make", "keep"),
    [
        (zoo.bert, {"L0.ffn": range(16), "L1.ffn": range(4, 24), "L0.head": [0, 2]}),
        pytest.param(zoo.bert, {"layers": [1]}, marks=pytest.mark.slow),
        pytest.param(zoo.gpt2, {"L0.ffn": range(16), "L1.head": [1, 2]}, marks=pytest.mark.slow),
        (zoo.llama, {"L0.ffn": range(16), "L1.kv": [1]}),
    ],
)
def test_removed_units_are_removed_again(make, keep, tmp_path):
    fast = compiled(make(), {name: list(units) for name, units in keep.items()})
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast")
    assert torch.equal(zoo.logits(again), zoo.logits(fast))
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (fast, again)]
    assert shapes[0] == shapes[1]
    runtime.save(again, tmp_path / "again")
    assert torch.equal(zoo.logits(runtime.load(tmp_path / "again")), zoo.logits(fast))


@pytest.fixture(scope="module")
def fast():
    return compiled(zoo.bert(num_hidden_layers=1), {})


def test_an_output_is_not_overwritten_unasked(fast, tmp_path):
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "mine").write_text("dear")
    with pytest.raises(SecateurError, match="exists; choose another output"):
        runtime.save(fast, tmp_path / "fast")
    assert [p.name for p in (tmp_path / "fast").iterdir()] == ["mine"]
    runtime.save(fast, tmp_path / "fast", overwrite=True)
    names = ["config.json", "runtime.json", "runtime.safetensors"]
    assert sorted(p.name for p in (tmp_path / "fast").iterdir()) == names
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_damage_is_a_sentence(fast, tmp_path):
    folder = tmp_path / "fast"
    runtime.save(fast, folder)
    manifest, weights = (folder / "runtime.json").read_text(), (folder / "runtime.safetensors").read_bytes()

    def refused(match):
        with pytest.raises(ModelError, match=match) as found:
            runtime.load(folder)
        assert "\n" not in str(found.value)
        (folder / "runtime.json").write_text(manifest)
        (folder / "runtime.safetensors").write_bytes(weights)

    (folder / "runtime.json").write_text(manifest[:50])
    refused(r"runtime\.json is damaged")
    (folder / "runtime.json").write_text("[]")
    refused(r"runtime\.json is damaged")
    (folder / "runtime.json").write_text(json.dumps({**json.loads(manifest), "packed": 3}))
    refused(r"runtime\.json is damaged: 'packed' is 3")
    (folder / "runtime.json").write_text(json.dumps({**json.loads(manifest), "aliases": {"a": "b"}}))
    refused(r"runtime\.safetensors lacks b")
    (folder / "runtime.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(r"runtime\.safetensors is damaged or cut short")
