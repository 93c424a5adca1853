"""Eight bits in an ONNX program: dynamic quantisation by ONNX Runtime's own tool, and before it by hand what that tool
does badly, an embedding whose weight is the output layer's, too.

The tool rounds such a weight with one scale for the whole vocabulary and turns it back into float32 at every call. Here
it is stored once, with a scale a row, looked up as the embedding and multiplied as 8-bit integers as the output layer.
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
    """Largest whole number that a weight is rounded to: fewer on x86 processors without VNNI (see `runner`)."""
    return LEVELS if {"avx512", "neon"} & {*available_isas()} else SAFE_LEVELS


def quantise(path: Path) -> None:
    """Round the weights of the matrix products and embeddings of a program in place; other operators stay as they are.

    Activations are rounded as they come, each tensor with a scale of its own (ONNX Runtime's dynamic quantisation).
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(path)
    graph = OnnxGraph(model)
    done = [node for name in tied(graph) for node in split(graph, name)]
    ours = [node.name for node in graph.nodes if node.domain == DOMAIN]  # the tool takes Attention for its own
    graph.changed = True  # the tool infers shapes anew and trips over those noted of constants, which `finish` drops
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
    """Float weights (words, width) that are an embedding and, transposed, the output layer, read by no others."""
    found = []
    for name, tensor in graph.constants.items():
        if len(tensor.dims) != 2 or not graph.floats(name, *tensor.dims) or name in graph.kept:
            continue
        lookups = [node for node in graph.readers[name] if _looks_up(node, name)]
        turned = [node for node in graph.readers[name] if _turns(graph, node)]
        if lookups and turned and len(lookups) + len(turned) == len(graph.readers[name]):
            found.append(name)
    return found


def _looks_up(node: Any, name: str) -> bool:
    return node.op_type == "Gather" and node.input[0] == name and attributes(node).get("axis", 0) == 0


def _turns(graph: OnnxGraph, node: Any) -> bool:
    if node.op_type != "Transpose" or list(attributes(node).get("perm", [1, 0])) != [1, 0]:
        return False
    out = node.output[0]
    products = graph.readers[out]
    return out not in graph.kept and all(p.op_type == "MatMul" and p.input[0] != out for p in products)


def split(graph: OnnxGraph, name: str) -> list[str]:
    """Put a tied weight's 8-bit integers and its scales of the rows in its place; returns the names of the nodes that
    look up what is rounded already.
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
    for one in graph.readers[name]:
        out = one.output[0]
        if one.op_type == "Gather":
            words, names = one.input[1], [f"{out}.lookup", f"{out}.scale_lookup"]
            lookups += names
            graph.exchange(
                [one],
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
        graph.exchange([one], [node("Transpose", [whole], [f"{out}.int8"], perm=[1, 0])])
    return lookups


def _as_integers(product: Any, weight: str, scales: str) -> list[Any]:
    """A product with a weight of 8-bit integers, in the order in which ONNX Runtime finds it and makes one of it."""
    import onnx

    node, out = onnx.helper.make_node, product.output[0]
    given = [f"{out}.x.{part}" for part in ("int8", "scale", "zero")]
    return [
        node("DynamicQuantizeLinear", [product.input[0]], given),
        node("MatMulInteger", [given[0], weight, given[2]], [f"{out}.int32"]),
        node("Cast", [f"{out}.int32"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
        node("Mul", [given[1], scales], [f"{out}.scales"]),
        node("Mul", [f"{out}.float", f"{out}.scales"], [out]),
    ]
