"""Whole encoders as one operator of ONNX Runtime: what becomes a chain, that it gives the same, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from secateur.deploy import export
from secateur.deploy.onnx_graph.chains import fuse_chains
from secateur.deploy.onnx_graph.graph import OnnxGraph
from secateur.kernels.native import load_native, onnx_library
from secateur.kernels.packing import pack
from tests import zoo
from tests.deploy.onnx_graph.programs import session

pytestmark = pytest.mark.skipif(load_native() is None, reason="needs the compiled kernels")
FLOAT = onnx.TensorProto.FLOAT
NATIVE = Path(__file__).parents[3] / "native"


def packed(name, rows, cols, density=0.3, **kwargs):
    rng = np.random.default_rng(len(name) + rows)
    weight = (rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < density)).astype(np.float32)
    return onnx.numpy_helper.from_array(pack(weight, **{"tile": 16, **kwargs}), name)


def vector(name, values):
    return onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)


def ours(operator, inputs, output, **attributes):
    return onnx.helper.make_node(operator, inputs, [output], domain="secateur", **attributes)


def program(nodes, constants, outputs=("y",), more=(), shape=("b", "n", 32)):
    """A program of x (batch, tokens, 32) whose values have no other shape than x and q, k, v have."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", FLOAT, list(shape)), *more],
        [info(name, FLOAT, None) for name in outputs],
        constants,
        value_info=[
            info(node.output[0], FLOAT, [*shape[:2], 48] if node.output[0][0] == "u" else list(shape)) for node in nodes
        ],
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("secateur", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


BIAS, SCALE = vector("bias", np.linspace(-1, 1, 32)), vector("scale", np.linspace(0.5, 1.5, 32))
WEIGHTS = [packed(name, 32, 32) for name in "qkvo"] + [packed("up", 48, 32), packed("down", 32, 48)]


def layer(x="x", out="y"):
    """One encoder layer with norms after the sums."""
    return [
        *(ours("SparseLinear", [x, name, "bias"], f"{name}1") for name in "qk"),
        ours("SparseLinear", [x, "v"], "v1"),
        ours("Attention", ["q1", "k1", "v1", "", "keep"], "a", heads=4, scale=0.3),
        ours("SparseLinear", ["a", "o", "bias", x, "scale", "bias"], "h", norm=1, epsilon=1e-3),
        ours("SparseLinear", ["h", "up"], "u", activation=2),
        ours("SparseLinear", ["u", "down", "", "h", "scale"], out, norm=1),
    ]


KEEP = onnx.helper.make_tensor_value_info("keep", onnx.TensorProto.BOOL, ["b", 1, 1, "n"])


def both(model):
    """A program before and after its chains were found, and what it then consists of."""
    before = model.SerializeToString()
    graph = OnnxGraph(model)
    fuse_chains(graph)
    graph.finish()
    return before, model.SerializeToString(), [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("tokens", [1, 16, 37, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_layer_gives_the_same(tokens, threads):
    before, after, nodes = both(program(layer(), [*WEIGHTS, BIAS, SCALE], more=[KEEP]))
    assert nodes == ["SparseChain"]
    rng = np.random.default_rng(tokens)
    keep = rng.random((3, 1, 1, tokens)) < 0.8
    feed = {"x": rng.standard_normal((3, tokens, 32)).astype(np.float32), "keep": keep}
    (expected,) = session(before).run(None, feed)
    (got,) = session(after, threads).run(None, feed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    feed["x"][1, -1, 5] = np.nan
    (expected,), (got,) = session(before).run(None, feed), session(after, threads).run(None, feed)
    assert np.isnan(expected[1]).any()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_others_read_stays_outside():
    """A value in the middle that is an output ends the chain there; another begins behind it."""
    nodes = [*layer(out="m"), *layer("m")]
    for i, node in enumerate(nodes[7:]):
        node.output[0] += "2" if i < 6 else ""
        for j, name in enumerate(node.input):
            node.input[j] = name + "2" if name in ("q1", "k1", "v1", "a", "h", "u") else name
    constants = [*WEIGHTS, BIAS, SCALE]
    assert both(program(nodes, constants, ("y",), [KEEP]))[2] == ["SparseChain"]
    before, after, found = both(program(nodes, constants, ("y", "m"), [KEEP]))
    assert found == ["SparseChain", "SparseChain"]
    feed = {
        "x": np.random.default_rng(0).standard_normal((2, 20, 32)).astype(np.float32),
        "keep": np.ones((2, 1, 1, 20), bool),
    }
    for expected, got in zip(session(before).run(None, feed), session(after).run(None, feed), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # What comes before the layer in another format, and what comes after it.
        ("o", ["SparseChain", "SparseLinear", "SparseChain"]),
        # The residual of the last layer ends the chain where it is made.
        ("down", ["SparseChain", "SparseLinear", "SparseLinear"]),
    ],
)
def test_other_formats_stay_outside(other, expected):
    changed = packed(other, 32, 48 if other == "down" else 32, format="bitmask")
    weights = [changed if weight.name == other else weight for weight in WEIGHTS]
    before, after, found = both(program(layer(), [*weights, BIAS, SCALE], more=[KEEP]))
    assert found == expected
    feed = {"x": np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)}
    feed["keep"] = np.ones((2, 1, 1, 9), bool)
    (expected,), (got,) = session(before).run(None, feed), session(after).run(None, feed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_norms_before_the_layers(measured, tmp_path):
    export(zoo.pruned(zoo.vit()), "onnx", tmp_path / "out", sparse=True, tolerance=1e-5)
    info = json.loads((tmp_path / "out" / "artefact.json").read_text())["sparse"]
    assert info["chains"] == 1
    (file,) = (tmp_path / "out").glob("*.onnx")
    kinds = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    assert kinds.count("SparseChain") == 1
    assert "LayerNormalization" not in kinds


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 1, "do not fit together"),  # its own output
        (7, 1 << 40, "points outside"),
        (7, 4, "points outside"),  # not aligned
        (8, 128, "not a packed weight"),
        (9, 1 << 40, "points outside"),
        (0, 7, "do not fit together"),
        (12, 9, "do not fit together"),
    ],
)
def test_damaged_steps_are_refused(field, value, message):
    model = program(layer(), [*WEIGHTS, BIAS, SCALE], more=[KEEP])
    both(model)
    (steps,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(".steps"))
    table = onnx.numpy_helper.to_array(steps).copy()
    table[0, field] = value
    steps.CopyFrom(onnx.numpy_helper.from_array(table, steps.name))
    with pytest.raises(Exception, match=message):
        session(model.SerializeToString())


@pytest.mark.slow
def test_an_application_in_cpp(tmp_path):
    """The same program and library without Python, on the runtime that the Python package brings along."""
    compiler = shutil.which("g++") or shutil.which("c++")
    runtimes = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
    if compiler is None or not runtimes or not NATIVE.is_dir():
        pytest.skip("needs a compiler, the sources and ONNX Runtime as a library of its own")
    nodes = [node for node in layer() if node.op_type != "Attention"]
    nodes.insert(3, ours("Attention", ["q1", "k1", "v1"], "a", heads=4, scale=0.3))
    _, after, found = both(program(nodes, [*WEIGHTS, BIAS, SCALE]))
    assert found == ["SparseChain"]
    (tmp_path / "model.onnx").write_bytes(after)
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        str(NATIVE / "tests" / "run_onnx.cpp"),
        "-o",
        str(tmp_path / "run"),
        "-ldl",
    ]
    subprocess.run([*command, "-I", str(NATIVE / "include")], check=True)
    run = [tmp_path / "run", runtimes[-1], onnx_library(), tmp_path / "model.onnx", "2", "70", "32"]
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = (np.arange(2 * 70 * 32) % 16 / 8).astype(np.float32).reshape(2, 70, 32)
    (expected,) = session(after, 2).run(None, {"x": x})
    np.testing.assert_allclose(np.array(done.stdout.split(), float), expected.reshape(-1), rtol=1e-6, atol=1e-6)
