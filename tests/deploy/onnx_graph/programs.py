"""Programs of a few nodes, rewritten for the kernels and run in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime

from secateur.deploy import runner
from secateur.deploy.onnx_graph import sparse
from secateur.deploy.target import Written
from secateur.kernels.native import onnx_library


def session(model, threads=1):
    """A serialised program in ONNX Runtime with the kernels' operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(onnx_library())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def written(tmp_path, nodes, constants, outputs=("y",), whole=None, shapes=(), x=(6, 32), mask=False):
    """The operators of a program of those nodes, after it gave the same in ONNX Runtime as it is and rewritten.

    x: shape of the input. whole: constants of whole numbers. shapes: what the program notes of its values (those of x,
    or by name). mask: whether there is a second input mx (batch, 1, tokens, tokens).
    """
    info = onnx.helper.make_tensor_value_info
    symbolic = ["n" if i == len(x) - 2 else n for i, n in enumerate(x)]
    shapes = shapes if isinstance(shapes, dict) else dict.fromkeys(shapes, symbolic)
    more = [info("mx", onnx.TensorProto.FLOAT, [x[0], 1, "n", "n"])] if mask else []
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, i, o, **more) for op, i, o, more in nodes],
        "g",
        [info("x", onnx.TensorProto.FLOAT, symbolic), *more],
        [info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
        + [onnx.numpy_helper.from_array(np.asarray(v, np.int64), k) for k, v in (whole or {}).items()],
        value_info=[info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "dense.onnx")
    onnx.save(model, tmp_path / "model.onnx")
    sparse.rewrite({"model": Written(["model.onnx"], list(outputs))}, tmp_path, tokens=8, value="float32")
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal(x).astype(np.float32)}
    if mask:
        feed["mx"] = rng.standard_normal((x[0], 1, x[1], x[1])).astype(np.float32)
    before = runner.load_onnx(tmp_path, {"files": ["dense.onnx"]}, 1)(feed)
    after = runner.load_onnx(tmp_path, {"files": ["model.onnx"]}, 1, onnx_library())(feed)
    for name in outputs:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-5)
    return [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]


def weight(*shape):
    rng = np.random.default_rng(1)
    return rng.standard_normal(shape) * (rng.random(shape) < 0.2)
