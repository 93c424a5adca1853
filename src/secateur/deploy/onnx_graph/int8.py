"""Eight bits in an ONNX program: dynamic quantisation by ONNX Runtime's own tool, and code for what that tool does
badly: an embedding whose weight is the output layer's, too.

The tool rounds such a weight with one scale for the whole vocabulary and converts it to float32 at every call. Here it
is stored once, with a scale a row; the embedding looks rows up, and the output layer multiplies 8-bit integers.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from secateur.deploy.onnx_graph.graph import DOMAIN, OnnxGraph, attributes
from secateur.deploy.onnx_graph.sparse import save
from secateur.deploy.runner import SAFE_LEVELS
from secateur.kernels.native import available_isas

LEVELS = 127


def levels() -> int:
    """Largest whole number that a weight is rounded to: `runner.SAFE_LEVELS` on x86 processors without VNNI."""
    return LEVELS if {"avx512", "neon"} & {*available_isas()} else SAFE_LEVELS


def quantise(path: Path) -> None:
    """Round the weights of the matrix products and embeddings of a program in place; other operators stay as they are.

    Activations are rounded when the program runs, each tensor with a scale of its own (ONNX Runtime's dynamic
    quantisation).
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(path)
    graph = OnnxGraph(model)
    done = [node for name in tied(graph) for node in split(graph, name)]
    ours = [node.name for node in graph.nodes if node.domain == DOMAIN]  # the tool takes Attention for its own
    graph.changed = True  # the tool infers shapes and fails on notes about constants, which `finish` drops
    graph.finish()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        save(model, before)
        quantize_dynamic(
            before,
            after,
            per_channel=True,
            reduce_range=levels() == SAFE_LEVELS,
            use_external_data_format=True,
            nodes_to_exclude=[*done, *ours],
        )
        model = onnx.load(after)
    save(model, path)


def tied(graph: OnnxGraph) -> list[str]:
    """Float weights (words, width) that an embedding reads and, transposed, the output layer, and no other node."""
    names = []
    for name, tensor in graph.constants.items():
        if len(tensor.dims) != 2 or not graph.floats(name, *tensor.dims) or name in graph.kept:
            continue
        lookups = [node for node in graph.readers[name] if _looks_up(node, name)]
        transposed = [node for node in graph.readers[name] if _multiplies_transposed(graph, node)]
        if lookups and transposed and len(lookups) + len(transposed) == len(graph.readers[name]):
            names.append(name)
    return names


def _looks_up(node: Any, name: str) -> bool:
    return node.op_type == "Gather" and node.input[0] == name and attributes(node).get("axis", 0) == 0


def _multiplies_transposed(graph: OnnxGraph, node: Any) -> bool:
    """Whether a node transposes a matrix for products alone."""
    if node.op_type != "Transpose" or list(attributes(node).get("perm", [1, 0])) != [1, 0]:
        return False
    out = node.output[0]
    products = graph.readers[out]
    return out not in graph.kept and all(p.op_type == "MatMul" and p.input[0] != out for p in products)


def split(graph: OnnxGraph, name: str) -> list[str]:
    """Put the 8-bit integers of a tied weight and the scales of its rows in its place.

    Returns the names of the nodes that look up what is rounded already.
    """
    import onnx

    node = onnx.helper.make_node
    weight = onnx.numpy_helper.to_array(graph.constants[name])
    scale = np.abs(weight).max(1) / levels()
    scale[scale == 0] = 1
    whole = graph.add_constant(np.rint(weight / scale[:, None]).astype(np.int8), f"{name}.int8")
    scales = graph.add_constant(scale, f"{name}.scale")
    last = graph.add_constant(np.array([-1]), f"{name}.last")
    lookups: list[str] = []
    for reader in graph.readers[name]:
        out = reader.output[0]
        if reader.op_type == "Gather":
            words, names = reader.input[1], [f"{out}.lookup", f"{out}.scale_lookup"]
            lookups += names
            graph.exchange(
                [reader],
                [
                    node("Gather", [whole, words], [f"{out}.int8"], names[0], axis=0),
                    node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
                    node("Gather", [scales, words], [f"{out}.scale"], names[1], axis=0),
                    node("Unsqueeze", [f"{out}.scale", last], [f"{out}.scale_last"]),
                    node("Mul", [f"{out}.float", f"{out}.scale_last"], [out]),
                ],
            )
            continue
        for product in graph.readers[out]:
            graph.exchange([product], _as_integers(product, f"{out}.int8", scales))
        graph.exchange([reader], [node("Transpose", [whole], [f"{out}.int8"], perm=[1, 0])])
    return lookups


def _as_integers(product: Any, weight: str, scales: str) -> list[Any]:
    """A product with a weight of 8-bit integers, as nodes in the order in which ONNX Runtime fuses them into one."""
    import onnx

    node, out = onnx.helper.make_node, product.output[0]
    rounded, scale, zero = (f"{out}.x.{part}" for part in ("int8", "scale", "zero"))
    return [
        node("DynamicQuantizeLinear", [product.input[0]], [rounded, scale, zero]),
        node("MatMulInteger", [rounded, weight, zero], [f"{out}.int32"]),
        node("Cast", [f"{out}.int32"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
        node("Mul", [scale, scales], [f"{out}.scales"]),
        node("Mul", [f"{out}.float", f"{out}.scales"], [out]),
    ]
