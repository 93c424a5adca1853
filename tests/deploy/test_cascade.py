"""Cascades on a runtime: made-up programs row by row, exports against PyTorch, and what is refused."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from secateur.deploy import runner

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
RUNTIMES = [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]


# -- the runner, on programs made by hand ----------------------------------------------------------------------------


def program(path, factor, outputs=("logits",)):
    """An ONNX program that gives x times a factor under each name."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ports = [helper.make_tensor_value_info("x", kind, ["batch", 2])]
    gives = [helper.make_tensor_value_info(name, kind, ["batch", 2]) for name in outputs]
    constant = helper.make_tensor("factor", kind, [1], [factor])
    nodes = [helper.make_node("Mul", ["x", "factor"], [name]) for name in outputs]
    graph = helper.make_graph(nodes, "scaled", ports, gives, [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    port = {"name": "x", "dtype": "float32", "shape": ["batch", 2], "fill": "normal"}
    return {"files": [path.name], "inputs": [port], "outputs": list(outputs)}


def artefact(folder, threshold=0.75, **changes):
    """A cascade whose second graph gives ten times the logits of the first one."""
    folder.mkdir()
    graphs = {"model": program(folder / "a.onnx", 1.0), "full": program(folder / "b.onnx", 10.0)}
    info = {"format": 1, "target": "onnx", "graphs": graphs}
    info |= {"cascade": {"threshold": threshold, "escalated": 0.25}, **changes}
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    return folder


ROWS = np.array([[0, 3], [0, 1], [2, 0], [0.5, 0]], np.float32)
"""Their confidences: 0.95, 0.73, 0.88, 0.62."""


def test_rows_below_the_threshold_get_the_second_graph(tmp_path):
    got = runner.cascade(artefact(tmp_path / "a"), {"x": ROWS})
    assert got["escalated"].tolist() == [False, True, False, True]
    assert np.allclose(got["logits"], ROWS * np.array([[1], [10], [1], [10]]))


@pytest.mark.parametrize(("threshold", "factor"), [(0.0, 1), (2.0, 10)])
def test_one_row_gets_either_graph(tmp_path, threshold, factor):
    run = runner.open_cascade(artefact(tmp_path / "a", threshold))
    assert np.allclose(run({"x": ROWS[:1]})["logits"], ROWS[:1] * factor)


def test_the_public_face_answers_as_the_runner(tmp_path):
    pytest.importorskip("torch")
    from secateur import deploy

    folder = artefact(tmp_path / "a")
    expected = runner.cascade(folder, {"x": ROWS})["logits"]
    assert np.array_equal(deploy.cascade(folder, {"x": ROWS})["logits"], expected)
    assert np.array_equal(deploy.open_cascade(folder)({"x": ROWS})["logits"], expected)


def test_confidence_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    from secateur.dynamic.cascade import confidence_of

    logits = np.random.default_rng(0).normal(0, 20, (50, 3)).astype(np.float32)
    assert np.allclose(runner.confidence(logits), confidence_of(torch.from_numpy(logits)), rtol=1e-12, atol=0)


def test_a_timed_call_counts_the_second_graph_by_its_share(tmp_path):
    folder = artefact(tmp_path / "a")
    assert runner.shares(runner.read(folder)) == {"model": 1.0, "full": 0.25}
    (row,) = runner.measure({"a": folder}, 2, 0, 1, turns=2, runs=1).values()
    assert row["median_ms"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cascade": {"threshold": 0.5}}, "cascade lacks 'escalated'"),
        ({"cascade": {"threshold": "0.5", "escalated": 0.1}}, "threshold is '0.5', not a finite number"),
        ({"cascade": {"threshold": 0.5, "escalated": 1.5}}, "escalated is 1.5, not a share from 0 to 1"),
        ({"cascade": {"threshold": 0.5, "escalated": 0.1, "run": "x"}}, "'run', which this version does not know"),
    ],
)
def test_what_a_cascade_may_not_say(tmp_path, changes, said):
    with pytest.raises(runner.ArtefactError, match=said):
        runner.read(artefact(tmp_path / "a", **changes))


def test_a_cascade_has_two_graphs_with_logits(tmp_path):
    folder = artefact(tmp_path / "a")
    info = json.loads((folder / runner.MANIFEST).read_text())
    one = {**info, "graphs": {"model": info["graphs"]["model"]}}
    (folder / runner.MANIFEST).write_text(json.dumps(one))
    with pytest.raises(runner.ArtefactError, match="its graphs are not 'model' and one of 'full', 'rest'"):
        runner.read(folder)
    graphs = {**info["graphs"], "full": {**info["graphs"]["full"], "outputs": ["scores"]}}
    (folder / runner.MANIFEST).write_text(json.dumps({**info, "graphs": graphs}))
    with pytest.raises(runner.ArtefactError, match="full does not give 'logits'"):
        runner.read(folder)
    (folder / runner.MANIFEST).write_text(json.dumps({k: v for k, v in one.items() if k != "cascade"}))
    with pytest.raises(runner.ArtefactError, match="is no cascade; export it again"):
        runner.cascade(folder, {"x": ROWS})


def test_a_kit_carries_both_graphs(tmp_path, monkeypatch):
    """The kit's own script answers as a cascade, without secateur."""
    pytest.importorskip("torch")
    from secateur.deploy import write_kit

    assert write_kit([artefact(tmp_path / "a")], tmp_path / "kit", ["onnx"]) == []
    kit = runner.read_kit(tmp_path / "kit")
    (place,) = kit["runtimes"]["onnx"].values()
    assert {f"{place}/a.onnx", f"{place}/b.onnx"} <= kit["files"].keys()
    spec = importlib.util.spec_from_file_location("device", tmp_path / "kit" / "device.py")
    device = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device", device)  # where its dataclasses look
    spec.loader.exec_module(device)
    assert device.cascade(tmp_path / "kit" / place, {"x": ROWS})["escalated"].tolist() == [False, True, False, True]


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(classifier):
    """A host on which all tokens pass, and the tokenizer of its folder."""
    pytest.importorskip("torch")
    import secateur
    from secateur.torch.data.text_rows import load_tokenizer

    tokenizer = load_tokenizer(classifier)
    return secateur.open(classifier, example=texts(tokenizer, 2)), tokenizer


@pytest.fixture(scope="module")
def pruned(dense):
    """A host that leaves out tokens."""
    from secateur.dynamic import prune_tokens

    return prune_tokens(dense[0], [40]), dense[1]


def texts(tokenizer, count):
    from ..text_models import sentences

    found = [text for text, _ in sentences(count, seed=5)]
    return dict(tokenizer(found, padding=True, return_tensors="pt"))


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNTIMES)
def test_a_cascade_on_a_runtime(pruned, rows, tmp_path, to):
    from secateur.deploy import cascade, export
    from secateur.dynamic import Cascade

    host, tokenizer = pruned
    said = []
    made = export(
        host.model, to, tmp_path / "out", processor=tokenizer, data=rows, cascade=0.8, calibration=rows, say=said.append
    )
    assert any("at least 80% is certified" in sentence for sentence in said)
    assert made.parity.relative_error < 1e-5
    info = runner.read(made.folder)
    assert info["graphs"].keys() == {"model", "full"}
    found = Cascade(**info["cascade"])
    assert (found.rows, found.wanted, found.sure) == (len(rows), 0.8, 0.95)
    assert runner.verify_files(made.folder) == len(info["sizes"])
    if to == "onnx":  # both graphs read one file of weights
        assert set(info["graphs"]["full"]["files"]) >= {"full.onnx", "model.onnx.data"}
        assert not (made.folder / "full.onnx.data").exists()
    batch = texts(tokenizer, 12)
    expected, got = found.run(host.model, batch), cascade(made.folder, batch)
    assert got["escalated"].tolist() == expected.escalated.tolist()
    assert np.abs(got["logits"] - expected.logits.numpy()).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNTIMES)
def test_an_exit_on_a_runtime(dense, tmp_path, to):
    from secateur.deploy import cascade, export
    from secateur.dynamic import fit_exit

    host, tokenizer = dense
    batches = [texts(tokenizer, 80)]
    early = fit_exit(host, batches, 0.6, 0.8)
    made = export(host.model, to, tmp_path / "out", processor=tokenizer, data=batches, cascade=early)
    info = runner.read(made.folder)
    assert info["graphs"].keys() == {"model", "rest"}
    assert "states" in info["graphs"]["model"]["outputs"]
    batch = texts(tokenizer, 12)
    expected, got = early.run(host.model, batch), cascade(made.folder, batch)
    assert got.keys() == {"logits", "escalated"}
    assert got["escalated"].tolist() == expected.escalated.tolist()
    assert np.abs(got["logits"] - expected.logits.numpy()).max() < 1e-5


@needs_onnx
def test_two_programs_share_the_weights_that_are_the_same(tmp_path):
    import onnx
    import onnxruntime

    from secateur.deploy.onnx_graph.shared import share
    from secateur.deploy.target import Written

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    generator = np.random.default_rng(0)
    common, one, two = generator.normal(size=(3, 64, 64)).astype(np.float32)
    x = generator.normal(size=(2, 64)).astype(np.float32)
    for name, weights in {"model": {"a": common, "b": one}, "full": {"left": two, "right": common}}.items():
        first, second = weights
        nodes = [helper.make_node("MatMul", ["x", first], ["h"]), helper.make_node("MatMul", ["h", second], ["y"])]
        ports = [helper.make_tensor_value_info(port, kind, ["batch", 64]) for port in ("x", "y")]
        tensors = [onnx.numpy_helper.from_array(value, key) for key, value in weights.items()]
        graph = helper.make_graph(nodes, name, ports[:1], ports[1:], tensors)
        saved = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(saved, tmp_path / f"{name}.onnx", save_as_external_data=True, location=f"{name}.onnx.data")
    written = {n: Written([f"{n}.onnx", f"{n}.onnx.data"], ["y"]) for n in ("model", "full")}
    shared = share(written, tmp_path, "model", "full")
    assert shared["model"] == written["model"]
    assert list(shared["full"].files) == ["full.onnx", "model.onnx.data", "full.onnx.data"]
    assert (tmp_path / "full.onnx.data").stat().st_size == two.nbytes
    for name, product in {"model": x @ common @ one, "full": x @ two @ common}.items():
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert np.allclose(session.run(None, {"x": x})[0], product, atol=1e-2)


def test_a_runtime_that_chooses_other_rows_is_refused():
    torch = pytest.importorskip("torch")
    from secateur.deploy.jobs.cascade import _check_rows
    from secateur.deploy.target import DeployError
    from secateur.dynamic import Answer, Cascade

    expected = Answer(torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.tensor([False, True]))
    same = {"logits": np.array([[2, 0], [0, 9]], np.float32), "escalated": np.array([False, True])}
    other = {"logits": np.array([[5, 0], [0, 9]], np.float32), "escalated": np.array([True, True])}
    at_threshold = float(runner.confidence(np.array([[2.0, 0.0]]))[0]) + 1e-6
    _check_rows(Cascade(0.7, 0.5, 1.0, 2), expected, same)
    _check_rows(Cascade(at_threshold, 0.5, 1.0, 2), expected, other)
    with pytest.raises(
        DeployError, match=r"other rows than in PyTorch: one of confidence 0.8808 at the threshold 0.7000"
    ):
        _check_rows(Cascade(0.7, 0.5, 1.0, 2), expected, other)


@needs_onnx
def test_exports_that_cannot_be_a_cascade(classifier, pruned, rows, tmp_path):
    from secateur.deploy import export
    from secateur.deploy.target import DeployError
    from secateur.errors import DataError, ModelError

    host, tokenizer = pruned
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="this one has none; make it with `secateur prune --tokens`"):
        export(classifier, "onnx", out, data=rows, cascade=0.9)
    with pytest.raises(DataError, match="30 rows cannot certify 99% agreement .* it takes 299 rows"):
        export(host.model, "onnx", out, processor=tokenizer, data=rows, cascade=0.99)
    with pytest.raises(DeployError, match="give data, which needs no labels"):
        export(host.model, "onnx", out, processor=tokenizer, cascade=0.9)
    for option in ("generate", "int8", "sparse"):
        with pytest.raises(DeployError, match=f"leave out {option}"):
            export(host.model, "onnx", out, processor=tokenizer, data=rows, cascade=0.9, **{option: True})
    assert not out.exists()
