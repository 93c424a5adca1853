"""What decoders compute between their layers, in sparse programs for ONNX Runtime: norms, rotary positions, gates, and
attention over a cache."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from secateur.deploy.onnx_graph.graph import attributes
from secateur.kernels.native import load_native
from tests.deploy.onnx_graph.programs import weight, written

pytestmark = pytest.mark.skipif(load_native() is None, reason="needs the compiled kernels")


def program(tmp_path, kind):
    """The nodes of one kind in what was written last."""
    return [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == kind]


def rms(square="x", power="two", last=("s", "n")):
    return [
        ("Pow", [square, power], ["p"], {}),
        ("ReduceMean", ["p", "axes"], ["m"], {"keepdims": 1}),
        ("Add", ["m", "eps"], ["a"], {}),
        ("Sqrt", ["a"], ["q"], {}),
        ("Reciprocal", ["q"], ["r"], {}),
        ("Mul", ["x", "r"], ["n"], {}),
        ("Mul", list(last), ["y"], {}),
        ("MatMul", ["y", "w"], ["z"], {}),
    ]


@pytest.mark.parametrize(
    ("nodes", "axes", "scale", "expected"),
    [
        (rms(), [-1], np.linspace(0.5, 2, 32), 1),
        (rms(last=("n", "s")), [1], np.linspace(0.5, 2, 32), 1),
        (rms(power="three"), [-1], np.linspace(0.5, 2, 32), 0),
        (rms(), [0], np.linspace(0.5, 2, 32), 0),
        (rms(), [-1], np.full((1, 32), 2.0), 0),
        ([("Abs", ["x"], ["o"], {}), *rms(square="o")], [-1], np.linspace(0.5, 2, 32), 0),
    ],
)
def test_norms(measured, tmp_path, nodes, axes, scale, expected):
    constants = {"two": 2.0, "three": 3.0, "eps": 5.0, "s": scale, "w": weight(32, 48)}
    found = written(tmp_path, nodes, constants, ("y", "z"), whole={"axes": axes})
    assert found.count("Norm") == expected
    assert found.count("Sqrt") == 1 - expected
    if expected:
        (norm,) = program(tmp_path, "Norm")
        assert attributes(norm) == {"norm": 2, "epsilon": 5.0}


def rotary(first="zero half", second="half end", turned=("u", "a"), cos="c"):
    return [
        ("ReduceMean", ["x", "heads"], ["m"], {"keepdims": 1}),
        ("Cos", ["m"], ["c"], {}),
        ("Cos", ["x"], ["c4"], {}),
        ("Sin", ["m"], ["s"], {}),
        ("Slice", ["x", *first.split(), "last"], ["a"], {}),
        ("Slice", ["x", *second.split(), "last"], ["b"], {}),
        ("Neg", ["b"], ["u"], {}),
        ("Concat", list(turned), ["t"], {"axis": -1}),
        ("Mul", ["x", cos], ["p"], {}),
        ("Mul", ["t", "s"], ["q"], {}),
        ("Add", ["p", "q"], ["y"], {}),
        ("MatMul", ["y", "w"], ["z"], {}),
    ]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (rotary(), 1),
        (rotary("zero quarter", "quarter end"), 0),
        (rotary(turned=("a", "u")), 0),
        (rotary(turned=("b", "a")), 0),
        (rotary(cos="c4"), 0),
    ],
)
def test_rotary_positions(measured, tmp_path, nodes, expected):
    whole = {"heads": [1], "zero": [0], "quarter": [4], "half": [8], "end": [2**40], "last": [3]}
    shapes = {"c": [2, 1, "n", 16], "s": [2, 1, "n", 16], "c4": [2, 3, "n", 16]}
    found = written(tmp_path, nodes, {"w": weight(16, 24)}, ("y", "z"), whole, shapes, (2, 3, 5, 16))
    assert found.count("Rotary") == expected
    assert found.count("Concat") == 1 - expected


def repeated(name, axis):
    """k and v (2, 2, n, 16), their heads repeated: each after itself, or all after all."""
    return [
        ("Unsqueeze", [name, axis], [f"{name}1"], {}),
        ("Expand", [f"{name}1", f"by {axis}"], [f"{name}2"], {}),
        ("Reshape", [f"{name}2", "four"], [f"{name}3"], {}),
    ]


@pytest.mark.parametrize(("axis", "kv_heads"), [("two", 2), ("one", 4)])
def test_attention_over_a_cache(measured, tmp_path, axis, kv_heads):
    nodes = [
        ("Slice", ["x", "zero", "two", "one"], ["k"], {}),
        ("Slice", ["x", "two", "end", "one"], ["v"], {}),
        *repeated("k", axis),
        *repeated("v", axis),
        ("Transpose", ["k3"], ["kt"], {"perm": [0, 1, 3, 2]}),
        ("Mul", ["x", "scale"], ["q"], {}),
        ("MatMul", ["q", "kt"], ["scores"], {}),
        ("Softmax", ["scores"], ["p"], {"axis": -1}),
        ("MatMul", ["p", "v3"], ["o"], {}),
        ("Transpose", ["o"], ["ot"], {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["ot", "merged"], ["y"], {}),
        ("MatMul", ["y", "w"], ["z"], {}),
    ]
    whole = {"zero": [0], "one": [1], "two": [2], "end": [9], "four": [2, 4, -1, 16], "merged": [2, -1, 64]}
    whole |= {"by two": [1, 1, 2, 1, 1], "by one": [1, 2, 1, 1, 1]}
    shapes = {
        **{name: [2, 2, "n", 16] for name in "kv"},
        **{f"{name}2": [2, 2, 2, "n", 16] for name in "kv"},
        **{f"{name}3": [2, 4, "n", 16] for name in "kv"},
        "y": [2, "n", 64],
    }
    found = written(tmp_path, nodes, {"scale": 0.25, "w": weight(64, 24)}, ("y", "z"), whole, shapes, (2, 4, 5, 16))
    assert "Softmax" not in found
    (attention,) = program(tmp_path, "Attention")
    assert list(attention.input) == (["x", "k", "v"] if kv_heads == 2 else ["x", "k3", "v3"])
    assert attributes(attention)["kv_heads"] == kv_heads


GATED = [
    ("MatMul", ["x", "g"], ["g1"], {}),
    ("Sigmoid", ["g1"], ["g2"], {}),
    ("Mul", ["g1", "g2"], ["g3"], {}),
    ("MatMul", ["x", "u"], ["u1"], {}),
]


@pytest.mark.parametrize(
    ("nodes", "outputs", "expected"),
    [
        ([*GATED, ("Mul", ["g3", "u1"], ["h"], {}), ("MatMul", ["h", "d"], ["y"], {})], ("y",), ["SparseLinear"] * 3),
        ([*GATED, ("Mul", ["u1", "g3"], ["h"], {}), ("Add", ["h", "x"], ["y"], {})], ("y",), ["SparseLinear"] * 2),
        # Two layers without an activation.
        ([GATED[0], GATED[3], ("Mul", ["u1", "g1"], ["y"], {})], ("y",), ["SparseLinear"] * 2),
        # What is seen elsewhere, or no more than a factor a feature, stays.
        ([*GATED, ("Mul", ["g3", "u1"], ["y"], {})], ("y", "u1"), ["SparseLinear"] * 2 + ["Mul"]),
        ([GATED[3], ("Mul", ["u1", "f"], ["y"], {})], ("y",), ["SparseLinear", "Mul"]),
    ],
)
def test_gates(measured, tmp_path, nodes, outputs, expected):
    constants = {name: weight(32, 32) * (0.2 + 0.1 * i) for i, name in enumerate("gud")} | {"f": np.linspace(-1, 1, 32)}
    shapes = ["g1", "g3", "u1", "h"]
    assert written(tmp_path, nodes, constants, outputs, shapes=shapes) == expected
    assert written(tmp_path, nodes, constants, outputs, shapes=shapes, x=(2, 5, 32)) == expected
