"""What earlier code wrote still loads, and gives the numbers that it gave. `write.py` says how the files were made."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file

import secateur
from secateur import runtime
from secateur.kernels.native import load_native
from tests.zoo import Sentence

HERE = Path(__file__).parent
TOLERANCE = 2e-5
"""Of the largest output: processors add in different orders."""


def cases(kind):
    return sorted(HERE.glob(f"*/{kind}"))


def named(place):
    return f"{place.parts[-3]}/{place.name}"


def agree(place, model):
    tensors = load_file(place / "numbers.safetensors")
    expected = tensors.pop("answer")
    with torch.no_grad():
        found = model(**{name.removeprefix("input "): tensor for name, tensor in tensors.items()})
    found = found if isinstance(found, torch.Tensor) else found.logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("place", cases("folders/*"), ids=named)
def test_folders(place):
    config = json.loads((place / "model" / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    agree(place, cls.from_pretrained(place / "model"))
    assert secateur.Plan.load(place / "model").provenance is not None


@pytest.mark.parametrize("place", cases("plain"), ids=named)
def test_folders_of_plain_modules(place):
    agree(place, secateur.load(place / "model", Sentence().eval()))


@pytest.mark.parametrize("place", cases("plan"), ids=named)
def test_plans(place):
    plan = secateur.Plan.load(place)
    said = json.loads((place / "numbers.json").read_text())
    assert {name: kept.tolist() for name, kept in plan.keep.items()} == said["keep"]
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == said["kept"]
    assert plan.weights.keys() == said["weights"].keys()
    for name, array in plan.weights.items():
        assert np.abs(array).sum(dtype="float64") == pytest.approx(said["weights"][name])


@pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize("place", cases("compiled/*"), ids=named)
def test_compiled_models(place, tmp_path):
    fast = runtime.load(place / "model")
    agree(place, fast)
    runtime.save(fast, tmp_path / "again")
    manifests = [(folder / "runtime.json").read_text() for folder in (place / "model", tmp_path / "again")]
    assert json.loads(manifests[0]) == json.loads(manifests[1])


@pytest.mark.parametrize("place", cases("artefacts/*/numbers-*.safetensors"), ids=lambda p: p.parts[-2])
def test_artefacts(place):
    from secateur.deploy import runner, target

    info = target.read(place.parent / "model")
    for package in {"onnx": ["onnxruntime"], "litert": ["ai_edge_litert"]}.get(info["target"], [info["target"]]):
        pytest.importorskip(package)
    if "sparse" in info and load_native() is None:
        pytest.skip("the kernels are not compiled")
    if runner.overflows(info):
        pytest.skip("ONNX Runtime multiplies full 8-bit weights wrongly on this processor, which has no VNNI")
    tensors = load_file(place)
    feed = {n.removeprefix("input "): t.numpy() for n, t in tensors.items() if n.startswith("input ")}
    program = target.load(place.parent / "model", place.stem.removeprefix("numbers-"))
    found = program(feed)
    expected = {n.removeprefix("output "): t.numpy() for n, t in tensors.items() if n.startswith("output ")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1e-3, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("place", cases("results"), ids=named)
def test_results_and_tables(place):
    from secateur.cost import LatencyTable
    from secateur.deploy import read_results

    said = json.loads((place / "latency.json").read_text())
    table = LatencyTable.from_json(said["table"])
    assert table.as_json() == {"layers": {}} | said["table"] | {"curves": table.as_json()["curves"]}
    assert table.predict(said["sizes"]) == pytest.approx(said["predicted"])
    rows = json.loads((place / "results.json").read_text())["rows"]
    found = read_results(place).timings
    assert [(row.model, row.runtime, row.median_ms) for row in found] == [
        (row["model"], row["runtime"], row["median_ms"]) for row in rows
    ]
