"""Eight bits in ONNX programs: the weight of an embedding tied to the output layer, sparse programs, generation."""

import json
import warnings

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import secateur
from secateur.deploy import export, generator, runner
from secateur.deploy.jobs import generation
from secateur.deploy.onnx_graph import int8
from secateur.deploy.target import DeployError
from secateur.kernels.native import load_native
from tests import zoo

WORDS, WIDTH = 60, 32


def program(path, turned="t", more=()):
    """An embedding of words, and the same weight as the output layer; saved, and its weight."""
    weight = np.random.default_rng(0).standard_normal((WORDS, WIDTH)).astype(np.float32)
    weight[3] = 0
    weight[7] *= 50  # with one scale for all rows, the others would keep few levels
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [make("Gather", ["w", "ids"], ["x"]), make("Transpose", ["w"], ["t"], perm=[1, 0])]
    nodes += [make("MatMul", ["x", turned], ["y"]), *more]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("ids", onnx.TensorProto.INT64, ["n", "m"])],
        [info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")],
        [onnx.numpy_helper.from_array(weight, "w")],
        value_info=[info("t", onnx.TensorProto.FLOAT, [WIDTH, WORDS])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return weight


def test_a_tied_weight_is_stored_once_with_a_scale_a_row(tmp_path):
    weight = program(tmp_path / "model.onnx")
    int8.quantise(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    (whole,) = [t for t in model.graph.initializer if list(t.dims) == [WORDS, WIDTH]]
    assert whole.data_type == onnx.TensorProto.INT8
    kinds = [node.op_type for node in model.graph.node]
    assert "MatMulInteger" in kinds
    assert "MatMul" not in kinds
    assert "DequantizeLinear" not in kinds
    ids = np.array([[3, 7, 11], [0, 59, 2]])
    out = runner.load_onnx(tmp_path, {"files": ["model.onnx"]}, 1)({"ids": ids})
    step = np.abs(weight).max(1) / int8.levels()
    assert (np.abs(out["x"] - weight[ids]) <= 0.5001 * step[ids][..., None]).all()
    expected = weight[ids] @ weight.T
    # half a level of each rounded weight and of each rounded activation (255 levels over the whole tensor)
    level = float(weight[ids].max() - weight[ids].min()) / 255
    bound = np.abs(weight[ids]).sum(-1, keepdims=True) * step / 2 + level * np.abs(weight).sum(1) + 1e-4
    assert (np.abs(out["y"] - expected) <= bound + level * step * WIDTH).all()


def test_a_weight_that_others_read_is_left_to_the_tool(tmp_path):
    other = onnx.helper.make_node("ReduceMax", ["w"], ["z"], keepdims=0)
    program(tmp_path / "model.onnx", more=[other])
    from secateur.deploy.onnx_graph.graph import OnnxGraph

    assert int8.tied(OnnxGraph(onnx.load(tmp_path / "model.onnx"))) == []
    program(tmp_path / "model.onnx")
    assert int8.tied(OnnxGraph(onnx.load(tmp_path / "model.onnx"))) == ["w"]


@pytest.mark.parametrize(
    ("flags", "levels", "warned"),
    [({"avx2"}, 127, True), ({"avx2"}, 64, False), ({"avx2", "avx_vnni"}, 127, False), (set(), 127, False)],
)
def test_eight_bits_from_elsewhere_that_overflow_here_are_said(flags, levels, warned, tmp_path, monkeypatch):
    program(tmp_path / "model.onnx")
    graph = {"files": ["model.onnx"], "inputs": [], "outputs": ["y"]}
    info = {"format": runner.FORMAT, "target": "onnx", "graphs": {"model": graph}, "int8": True, "levels": levels}
    (tmp_path / runner.MANIFEST).write_text(json.dumps(info))
    monkeypatch.setattr(runner, "processor_flags", lambda: flags)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner.load(tmp_path)
    assert any("its products overflow" in str(each.message) for each in said) == warned


@pytest.mark.slow
@pytest.mark.skipif(load_native() is None, reason="needs the compiled kernels")
def test_generation_of_a_sparse_decoder_with_eight_bits_for_the_rest(measured, tmp_path):
    model = zoo.llama(num_hidden_layers=1)
    secateur.open(model).apply(
        secateur.prune(secateur.open(model), secateur.criteria.magnitude, secateur.Block(8, 1), 0.5)
    )
    made = export(
        model, "onnx", tmp_path / "out", generate=True, sparse=True, int8=True, tokens=1, value="float16", tolerance=0.1
    )
    assert made.generation["agreement"] > 0.7
    assert made.generation["relative_error"] > 1e-4
    nodes = [node.op_type for node in onnx.load(next((tmp_path / "out").glob("*.onnx"))).graph.node]
    assert nodes.count("MatMulInteger") == 1
    assert "SparseLinear" in nodes
    info = json.loads((tmp_path / "out" / "artefact.json").read_text())
    assert info["int8"] is True
    assert info["sparse"]["value"] == "float16"
    run, prompt = generator(tmp_path / "out"), {"input_ids": np.array([[5, 9, 30, 7]])}
    assert (
        run(prompt, 5).tolist() == generation.generate(tmp_path / "out", prompt, 5).tolist() == run(prompt, 5).tolist()
    )
    inputs = {"input_ids": torch.tensor([[5, 9, 30, 7]])}
    with pytest.raises(DeployError, match=r"logits by .* of their scale \(permitted: 1e-06\)"):
        generation.compare(model, tmp_path / "out", inputs, 1e-6, rounded=True)
