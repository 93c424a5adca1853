"""Sparse programs for ONNX Runtime: what the rewriting of a graph takes in, its parity, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import secateur
from secateur.deploy import export, runner, target
from secateur.deploy.onnx_graph import sparse
from secateur.deploy.onnx_graph.graph import attributes
from secateur.deploy.target import DeployError
from secateur.kernels.format import describe
from secateur.kernels.native import load_native, onnx_library
from tests import zoo
from tests.deploy.onnx_graph.programs import weight, written

pytestmark = pytest.mark.skipif(load_native() is None, reason="needs the compiled kernels")


@pytest.mark.slow
def test_a_pruned_classifier(measured, classifier, rows, tmp_path):
    model = zoo.pruned(zoo.noisy(secateur.load(classifier)))  # the exporter leaves out a bias of zeros
    model.save_pretrained(tmp_path / "pruned")
    for file in classifier.glob("tokenizer*"):
        (tmp_path / "pruned" / file.name).write_bytes(file.read_bytes())
    made = export(tmp_path / "pruned", "onnx", tmp_path / "out", data=rows, sparse=True, tolerance=1e-5)
    assert made.parity.agreement == 1.0
    info = json.loads((tmp_path / "out" / "artefact.json").read_text())
    found = {"layers": 14, "packed": 14, "norms": 0, "rotary": 0, "attentions": 2, "chains": 1}
    assert info["sparse"] == {"tokens": 128, "value": "float32", **found}
    program = onnx.load(tmp_path / "out" / "model.onnx")
    ours = [node for node in program.graph.node if node.domain == "secateur"]
    # The pooler and the head see one token.
    assert [node.op_type for node in ours] == ["SparseChain", "SparseLinear", "SparseLinear"]
    assert not any(node.op_type in ("Gelu", "LayerNormalization", "Softmax") for node in program.graph.node)


def test_weights_lie_aligned_in_a_smaller_file(measured, tmp_path):
    rng = np.random.default_rng(0)
    big = {name: rng.standard_normal((32, 512)) * (rng.random((32, 512)) < 0.1) for name in "wv"}
    written(tmp_path, [("MatMul", ["x", "w"], ["y"], {}), ("MatMul", ["x", "v"], ["z"], {})], big, ("y", "z"))
    program = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [tensor.name for tensor in program.graph.initializer] == ["w.packed", "v.packed"]
    for tensor in program.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.EXTERNAL
        assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % sparse.ALIGN == 0
    size = sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert size < 0.5 * (tmp_path / "dense.onnx").stat().st_size


@pytest.mark.slow
def test_generation_of_a_pruned_decoder(measured, tmp_path):
    made = export(zoo.pruned(zoo.llama(num_hidden_layers=2)), "onnx", tmp_path / "out", generate=True, sparse=True)
    assert made.generation["equal"]
    (file,) = (tmp_path / "out").glob("*.onnx")
    nodes = onnx.load(file).graph.node
    ours = [node for node in nodes if node.domain == "secateur"]
    assert {attributes(node)["activation"] for node in ours if node.op_type == "SparseLinear"} == {0, 4}  # SiLU
    info = json.loads((tmp_path / "out" / "artefact.json").read_text())["sparse"]
    assert (info["norms"], info["rotary"], info["attentions"]) == (5, 4, 2)
    assert not {"Softmax", "Sigmoid", "Sqrt", "Slice"} & {node.op_type for node in nodes}


BIAS = np.linspace(-1, 1, 48)


@pytest.mark.parametrize(
    ("nodes", "constants", "expected"),
    [
        ([("Gemm", ["x", "w", "b"], ["y"], {"transB": 1})], {"w": weight(48, 32), "b": BIAS}, ["SparseLinear"]),
        ([("Gemm", ["x", "w"], ["y"], {})], {"w": weight(32, 48)}, ["SparseLinear"]),
        ([("Gemm", ["x", "w"], ["y"], {"alpha": 2.0})], {"w": weight(32, 48)}, ["Gemm"]),
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("Add", ["b", "h"], ["g"], {}), ("Gelu", ["g"], ["y"], {})],
            {"w": weight(32, 48), "b": BIAS},
            ["SparseLinear"],
        ),
        # What is added is no bias, or is read twice.
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("Add", ["h", "b"], ["y"], {})],
            {"w": weight(32, 48), "b": np.ones((1, 48))},
            ["SparseLinear", "Add"],
        ),
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("Add", ["h", "h"], ["y"], {})],
            {"w": weight(32, 48)},
            ["SparseLinear", "Add"],
        ),
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("Relu", ["h"], ["g"], {}), ("Add", ["h", "g"], ["y"], {})],
            {"w": weight(32, 48)},
            ["SparseLinear", "Relu", "Add"],
        ),
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("Sigmoid", ["h"], ["s"], {}), ("Mul", ["s", "h"], ["y"], {})],
            {"w": weight(32, 48)},
            ["SparseLinear"],
        ),
        # One weight for two layers stays where it is.
        (
            [("MatMul", ["x", "w"], ["h"], {}), ("MatMul", ["h", "w"], ["y"], {})],
            {"w": weight(32, 32)},
            ["MatMul", "MatMul"],
        ),
    ],
)
def test_what_a_layer_takes_in(measured, tmp_path, nodes, constants, expected):
    # A second sparse layer, so that there is always something to rewrite.
    nodes = [*nodes, ("MatMul", ["x", "v"], ["z"], {})]
    found = written(tmp_path, nodes, {**constants, "v": weight(32, 16)}, ("y", "z"))
    assert found == [*expected, "SparseLinear"]


def test_residual_and_layer_norm(measured, tmp_path):
    norm = {"g": np.linspace(0.5, 1.5, 32), "h": np.linspace(-1, 1, 32)}
    nodes = [
        ("MatMul", ["x", "w"], ["a"], {}),
        ("Add", ["x", "a"], ["r"], {}),
        ("LayerNormalization", ["r", "g", "h"], ["y"], {"epsilon": 1e-3}),
        ("MatMul", ["y", "v"], ["b"], {}),
        ("Add", ["b", "y"], ["z"], {}),
    ]
    constants = {"w": weight(32, 32), "v": weight(32, 32), **norm}
    assert written(tmp_path, nodes, constants, ("y", "z"), shapes=["a", "r", "y", "b"]) == ["SparseLinear"] * 2
    # Without known shapes, a sum may be a broadcast.
    assert written(tmp_path, nodes, constants, ("y", "z")) == [
        "SparseLinear",
        "Add",
        "LayerNormalization",
        "SparseLinear",
        "Add",
    ]


def attention_nodes(mask=(), where=()):
    """Two heads of 16, as torch's exporter writes them; q, k and v are linear layers of x (2, n, 32)."""
    nodes = [("MatMul", ["x", name], [f"{name}1"], {}) for name in "qkv"]
    for name in "qkv":
        nodes.append(("Reshape", [f"{name}1", "split"], [f"{name}2"], {}))
        nodes.append(("Transpose", [f"{name}2"], [f"{name}3"], {"perm": [0, 2, 1, 3]}))
    nodes += [
        ("Transpose", ["k3"], ["k4"], {"perm": [0, 1, 3, 2]}),
        ("Mul", ["q3", "half"], ["q4"], {}),
        ("MatMul", ["q4", "k4"], ["s1"], {}),
        *mask,
        ("Softmax", ["s2" if mask else "s1"], ["p"], {"axis": -1}),
        ("MatMul", ["p", "v3"], ["o1"], {}),
        *where,
        ("Transpose", ["o2" if where else "o1"], ["o3"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["o3", "merge"], ["o4"], {}),
        ("MatMul", ["o4", "w"], ["y"], {}),
    ]
    return nodes


ATTENTION = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "w": (32, 32)}
SHAPES = {
    **{f"{n}1": [2, "n", 32] for n in "qkv"},
    **{f"{n}2": [2, "n", 2, 16] for n in "qkv"},
    **{f"{n}3": [2, 2, "n", 16] for n in "qkv"},
    "o4": [2, "n", 32],
    "m": [2, 1, "n", "n"],
}


@pytest.mark.parametrize(
    ("mask", "where", "scale", "expected"),
    [
        ((), (), 0.5, 1),
        ([("Mul", ["mx", "low"], ["m"], {}), ("Add", ["s1", "m"], ["s2"], {})], (), 0.5, 1),
        # A factor that differs from feature to feature is no scale.
        ((), (), np.linspace(0.1, 1, 16), 0),
        # Something that is not the mask's own decides where zeros go.
        (
            [("Mul", ["mx", "low"], ["m"], {}), ("Add", ["s1", "m"], ["s2"], {})],
            [("Less", ["o1", "half"], ["c"], {}), ("Where", ["c", "zero", "o1"], ["o2"], {})],
            0.5,
            0,
        ),
    ],
)
def test_attention(measured, tmp_path, mask, where, scale, expected):
    constants = {name: weight(*shape) for name, shape in ATTENTION.items()}
    constants |= {"half": scale, "low": -3.0, "zero": 0.0}
    whole = {"split": [2, -1, 2, 16], "merge": [2, -1, 32]}
    nodes = attention_nodes(mask, where)
    found = written(tmp_path, nodes, constants, whole=whole, shapes=SHAPES, x=(2, 9, 32), mask=bool(mask))
    assert found.count("SparseChain") == expected
    assert found.count("Softmax") == 1 - expected
    assert found.count("SparseLinear") == 4 * (1 - expected)


@pytest.mark.slow
def test_activations_are_rounded_when_asked(measured, tmp_path):
    torch.manual_seed(0)
    net, x = zoo.linear(64, 64, "1x4", 0.3), {"input": torch.randn(40, 64)}
    export(net, "onnx", tmp_path / "out", example=x, sparse=True, tokens=40, value="int8", activations="int8")
    info = json.loads((tmp_path / "out" / "artefact.json").read_text())
    assert info["sparse"]["activations"] == "int8"
    assert 1e-3 < info["parity"]["relative_error"] < 0.05
    with pytest.raises(DeployError, match="activations='int8' goes with value='int8', not 'float32'"):
        export(net, "onnx", tmp_path / "no", example=x, sparse=True, activations="int8")


def test_an_output_of_the_program_is_not_taken_in(measured, tmp_path):
    nodes = [("MatMul", ["x", "w"], ["h"], {}), ("Relu", ["h"], ["y"], {})]
    assert written(tmp_path, nodes, {"w": weight(32, 48)}, ("h", "y")) == ["SparseLinear", "Relu"]


def test_refusals(tmp_path):
    with pytest.raises(DeployError, match="none of the 1 linear layers is sparse enough"):
        written(tmp_path, [("MatMul", ["x", "w"], ["y"], {})], {"w": np.ones((32, 16))})
    net, x = nn.Linear(16, 16).eval(), {"input": torch.randn(2, 16)}
    with pytest.raises(DeployError, match="tokens must be positive, not 0"):
        export(net, "onnx", tmp_path / "out", example=x, sparse=True, tokens=0)
    with pytest.raises(DeployError, match="value must be one of float32, .*, not half"):
        export(net, "onnx", tmp_path / "out", example=x, sparse=True, value="half")
    assert not (tmp_path / "out").exists()
    openvino = pytest.importorskip("secateur.deploy.targets.openvino_target").TARGET
    from secateur.deploy.jobs.export import ExportOptions

    with pytest.raises(DeployError, match="openvino takes none of secateur's kernels"):
        ExportOptions(sparse=True).check(openvino)


def test_a_machine_without_the_library(measured, tmp_path, monkeypatch):
    written(tmp_path, [("MatMul", ["x", "w"], ["y"], {})], {"w": weight(32, 48)})
    ports = [{"name": "x", "dtype": "float32", "shape": ["batch", 32], "fill": "normal", "at_most": {}}]
    graph = {"files": ["model.onnx"], "inputs": ports, "outputs": ["y"], "operators": runner.OPERATORS}
    info = {"format": runner.FORMAT, "target": "onnx", "graphs": {"model": graph}}
    (tmp_path / runner.MANIFEST).write_text(json.dumps(info))
    library = onnx_library()
    monkeypatch.setattr(target, "installed_library", lambda: None)
    (tmp_path / "secateur_onnx.so").symlink_to(library)
    with pytest.raises(DeployError, match="runs on secateur's kernels: install secateur"):
        target.load(tmp_path)
    monkeypatch.setattr(target, "installed_library", lambda: library)
    assert target.load(tmp_path)({"x": np.ones((2, 32), np.float32)})["y"].shape == (2, 48)


def test_a_kit_carries_the_library_and_bench_says_nothing_of_zeros(tmp_path):
    from secateur.deploy.jobs.kit import carry_library
    from secateur.deploy.jobs.results import Timing, words

    digest = carry_library([{"graphs": {"model": {"operators": runner.OPERATORS}}}], tmp_path)
    assert (tmp_path / "secateur_onnx.so").stat().st_size > 10000
    assert runner.kit_library(tmp_path, {"library": digest}) == str(tmp_path / "secateur_onnx.so")
    assert carry_library([{"graphs": {"model": {}}}], tmp_path / "missing") is None
    slow, fast = (Timing("m", "onnx", 1, 1, zeros=0.5, sparse=s) for s in (False, True))
    assert len(words([slow])) == 1
    assert words([fast]) == []


def test_an_exported_layer_can_be_shared_among_threads():
    threads, weight = torch.get_num_threads(), np.random.default_rng(0).standard_normal((512, 64)).astype("float32")
    weight[np.abs(weight) < 1.5] = 0
    torch.set_num_threads(1)
    try:
        packed = sparse.pack_worthy(weight, tokens=128, value="float32", activations="float32", measure=False)
    finally:
        torch.set_num_threads(threads)
    found = describe(packed)
    assert -(-128 // found.tile) * -(-512 // found.row_block) >= sparse.SHARED_BY
