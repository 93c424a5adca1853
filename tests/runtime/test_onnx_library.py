"""The custom-operator library in ONNX Runtime: every function of its interface is called, and what is wrong is told."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from secateur.kernels import native
from secateur.kernels import packing as packed
from secateur.kernels.format import ACTIVATIONS
from secateur.runtime import onnx_library
from tests.deploy.onnx_graph.programs import session
from tests.kernels.weights import blocked, sparse

pytestmark = pytest.mark.skipif(native.load_native() is None, reason="needs the compiled kernels")


def program(blob, bias=None, activation=None, constant=True, features=None):
    """One SparseLinear; x has any shape that ends in `features`."""
    graph_inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)]
    constants = [onnx.numpy_helper.from_array(blob, "packed")] if constant else []
    if not constant:
        graph_inputs.append(onnx.helper.make_tensor_value_info("packed", onnx.TensorProto.UINT8, [len(blob)]))
    names = ["x", "packed"]
    if bias is not None:
        constants.append(onnx.numpy_helper.from_array(bias, "bias"))
        names.append("bias")
    attributes = {} if activation is None else {"activation": activation}
    node = onnx.helper.make_node("SparseLinear", names, ["y"], domain="secateur", **attributes)
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([node], "g", graph_inputs, outputs, constants)
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("secateur", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


FORMATS = [
    ({"format": "tiled"}, 1),
    ({"format": "tiled", "value": "bfloat16", "tile": 64}, 1),
    ({"format": "block", "block": 4}, 4),
    ({"format": "block", "block": 8, "value": "int8"}, 8),
    ({"format": "bitmask"}, 1),
]


@pytest.mark.parametrize(("packing", "block"), FORMATS)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (5, 70), (2, 33, 70), (0, 70)])
def test_same_as_the_kernels_from_python(packing, block, shape):
    blob = packed.pack(blocked(50, 70, 0.2, block), **packing)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    bias = np.linspace(-1, 1, 50, dtype=np.float32)
    (y,) = session(program(blob, bias)).run(None, {"x": x})
    expected = x.reshape(-1, 70) @ packed.unpack(blob).T + bias
    assert y.shape == (*shape[:-1], 50)
    np.testing.assert_allclose(y.reshape(-1, 50), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_activations_without_bias(activation):
    blob = packed.pack(sparse(24, 40, 0.2))
    x = np.random.default_rng(2).standard_normal((7, 40)).astype(np.float32)
    (y,) = session(program(blob, activation=activation)).run(None, {"x": x})
    assert np.array_equal(y, packed.linear(blob, x, activation=ACTIVATIONS[activation]))


def test_the_threads_of_a_session_change_nothing():
    blob = packed.pack(sparse(600, 300, 0.2), tile=32)
    x = np.random.default_rng(3).standard_normal((150, 300)).astype(np.float32)
    one, four = (session(program(blob), threads).run(None, {"x": x})[0] for threads in (1, 4))
    assert np.array_equal(one, four)
    np.testing.assert_allclose(one, x @ packed.unpack(blob).T, rtol=1e-4, atol=1e-4)


def test_not_a_number_spreads_as_in_a_dense_product():
    blob = packed.pack(sparse(8, 16, 0.5))
    x = np.ones((2, 16), np.float32)
    x[1, 3] = np.inf
    (y,) = session(program(blob)).run(None, {"x": x})
    weight = packed.unpack(blob)
    assert np.isfinite(y[0]).all()
    assert np.array_equal(np.isnan(y[1]), weight[:, 3] == 0)


def test_what_is_wrong_is_told():
    blob = packed.pack(sparse(8, 16, 0.2))
    damaged = blob.copy()
    damaged[len(damaged) // 2 :] = 255
    for model, words in [
        (program(damaged), "not a packed weight, or it is damaged"),
        (program(np.zeros(5, np.uint8)), "packed weight"),
        (program(blob, activation=9), "knows no activation 9"),
        (program(blob, constant=False), "must be an initializer"),
    ]:
        with pytest.raises(Exception, match=words):
            session(model)
    with pytest.raises(Exception, match="takes inputs of 16 features"):
        session(program(blob)).run(None, {"x": np.ones((2, 15), np.float32)})
    with pytest.raises(Exception, match="the bias of SparseLinear has 8 numbers"):
        session(program(blob, np.ones(7, np.float32))).run(None, {"x": np.ones((2, 16), np.float32)})


def test_an_installation_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="installed without a C\\+\\+17 compiler"):
        onnx_library()


def run(operator, inputs, **attributes):
    """One operator of ours on those inputs (None: left out); a constant is what comes in 'packed'."""
    made = {f"i{i}": value for i, value in enumerate(inputs) if value is not None}
    constants = [onnx.numpy_helper.from_array(value, k) for k, value in made.items() if value.dtype == np.uint8]
    feed = {k: value for k, value in made.items() if value.dtype != np.uint8}
    kinds = {"float32": onnx.TensorProto.FLOAT, "bool": onnx.TensorProto.BOOL}
    ports = [onnx.helper.make_tensor_value_info(k, kinds[str(v.dtype)], None) for k, v in feed.items()]
    names = [f"i{i}" if value is not None else "" for i, value in enumerate(inputs)]
    node = onnx.helper.make_node(operator, names, ["y"], domain="secateur", **attributes)
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([node], "g", ports, outputs, constants)
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("secateur", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return session(model.SerializeToString(), 2).run(None, feed)[0]


@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("packing", [{"format": "tiled"}, {"format": "block", "block": 4}, {"format": "bitmask"}])
def test_residual_and_norm(norm, packing):
    rng = np.random.default_rng(4)
    blob = packed.pack(blocked(48, 30, 0.2, 4), **packing)
    x, residual = (rng.standard_normal((2, 37, n)).astype(np.float32) for n in (30, 48))
    bias, scale, shift = (rng.standard_normal(48).astype(np.float32) for _ in range(3))
    y = run("SparseLinear", [x, blob, bias, residual, scale, shift], activation=1, norm=norm, epsilon=1e-3)
    z = np.maximum(x @ packed.unpack(blob).T + bias, 0) + residual
    if norm == 1:
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-3) * scale + shift
    elif norm == 2:
        z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-3) * scale + shift
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    alone = run("SparseLinear", [x, blob, None, None, scale], norm=norm)
    assert alone.shape == y.shape
    with pytest.raises(Exception, match="the residual of SparseLinear has the shape of its output"):
        run("SparseLinear", [x, blob, None, residual[:1]])
    with pytest.raises(Exception, match="knows no norm 3"):
        run("SparseLinear", [x, blob], norm=3)


def softmax_attention(q, k, v, heads, kv_heads, scale, mask=0.0):
    def split(a, n):
        return a.reshape(*a.shape[:2], n, -1).transpose(0, 2, 1, 3)

    k, v = (np.repeat(split(a, kv_heads), heads // kv_heads, 1) for a in (k, v))
    scores = split(q, heads) @ k.transpose(0, 1, 3, 2) * scale + mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(q.shape)


def test_attention():
    rng = np.random.default_rng(5)
    q = rng.standard_normal((2, 19, 24)).astype(np.float32)
    k, v = (rng.standard_normal((2, 23, 12)).astype(np.float32) for _ in range(2))
    for shape in [(2, 4, 19, 23), (1, 1, 19, 23), (2, 1, 1, 23)]:
        mask = rng.standard_normal(shape).astype(np.float32)
        keep = rng.random(shape) < 0.8
        expected = softmax_attention(q, k, v, 4, 2, 0.3, mask + np.where(keep, 0, -np.inf))
        got = run("Attention", [q, k, v, mask, keep], heads=4, kv_heads=2, scale=0.3)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    got = run("Attention", [q, q, q], heads=3)
    np.testing.assert_allclose(got, softmax_attention(q, q, q, 3, 3, 1.0), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="fitting sizes"):
        run("Attention", [q, k, k], heads=4)
    with pytest.raises(Exception, match="a multiple of kv_heads"):
        run("Attention", [q, k, k], heads=4, kv_heads=3)
    with pytest.raises(Exception, match="four dimensions"):
        run("Attention", [q, k, k, mask[:, 0]], heads=4, kv_heads=2)
