"""Eight bits in an ONNX program: dynamic quantisation by ONNX Runtime's own tool, and before it by hand what that tool
does badly, an embedding whose weight is the output layer's, too.

The tool rounds such a weight with one scale for the whole vocabulary and turns it back into float32 at every call. Here
it is stored once, with a scale a row, looked up as the embedding and multiplied as 8-bit integers as the output layer.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from secateur.deploy.onnx_graph import Graph, attributes
from secateur.deploy.sparse import save

LEVELS = 127
"""Largest whole number that a weight is rounded to."""


def quantise(path: Path) -> None:
    """Round the weights of the matrix products and embeddings of a program in place; other operators stay as they are.

    Activations are rounded as they come, each tensor with a scale of its own (ONNX Runtime's dynamic quantisation).
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(path)
    done = [node for name in tied(Graph(model)) for node in split(model, name)]
    # quantize_dynamic infers shapes anew and trips over those noted of constants that it has transposed
    constants = {tensor.name for tensor in model.graph.initializer}
    noted = [info for info in model.graph.value_info if info.name not in constants]
    del model.graph.value_info[:]
    model.graph.value_info.extend(noted)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        save(model, before)
        quantize_dynamic(before, after, per_channel=True, use_external_data_format=True, nodes_to_exclude=done)
        model = onnx.load(after)
    save(model, path)


def tied(graph: Graph) -> list[str]:
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


def _turns(graph: Graph, node: Any) -> bool:
    if node.op_type != "Transpose" or list(attributes(node).get("perm", [1, 0])) != [1, 0]:
        return False
    out = node.output[0]
    products = graph.readers[out]
    return out not in graph.kept and all(p.op_type == "MatMul" and p.input[0] != out for p in products)


def split(model: Any, name: str) -> list[str]:
    """Put a tied weight's 8-bit integers and its scales of the rows in its place, in a program as it is in memory;
    returns the names of the nodes that look up what is rounded already.
    """
    import onnx

    graph, node = model.graph, onnx.helper.make_node
    (tensor,) = [t for t in graph.initializer if t.name == name]
    weight = onnx.numpy_helper.to_array(tensor)
    scale = np.abs(weight).max(1) / LEVELS
    scale[scale == 0] = 1
    whole, scales, last = f"{name}.int8", f"{name}.scale", f"{name}.last"
    arrays = {whole: np.rint(weight / scale[:, None]).astype(np.int8), scales: scale, last: np.array([-1])}
    graph.initializer.remove(tensor)
    graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in arrays.items())
    turned: set[str] = set()
    lookups: list[str] = []
    nodes: list[Any] = []
    for one in graph.node:
        out = one.output[0]
        if one.op_type == "Gather" and one.input[0] == name:
            words, names = one.input[1], [f"{out}.lookup", f"{out}.scale_lookup"]
            lookups += names
            nodes += [
                node("Gather", [whole, words], [f"{out}.int8"], names[0], axis=0),
                node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
                node("Gather", [scales, words], [f"{out}.scale"], names[1], axis=0),
                node("Unsqueeze", [f"{out}.scale", last], [f"{out}.scale_last"]),
                node("Mul", [f"{out}.float", f"{out}.scale_last"], [out]),
            ]
        elif one.op_type == "Transpose" and one.input[0] == name:
            turned.add(out)
            nodes.append(node("Transpose", [whole], [out], perm=[1, 0]))
        elif one.op_type == "MatMul" and one.input[1] in turned:
            # in the order in which ONNX Runtime finds it and makes one product of it
            given = [f"{out}.x.{part}" for part in ("int8", "scale", "zero")]
            nodes += [
                node("DynamicQuantizeLinear", [one.input[0]], given),
                node("MatMulInteger", [given[0], one.input[1], given[2]], [f"{out}.int32"]),
                node("Cast", [f"{out}.int32"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
                node("Mul", [given[1], scales], [f"{out}.scales"]),
                node("Mul", [f"{out}.float", f"{out}.scales"], [out]),
            ]
        else:
            nodes.append(one)
    del graph.node[:]
    graph.node.extend(nodes)
    noted = [info for info in graph.value_info if info.name != name and info.name not in turned]
    del graph.value_info[:]
    graph.value_info.extend(noted)
    return lookups
