"""Finds what decoders compute between their layers in an ONNX graph, as torch's exporter writes it: root mean square
norms and rotary positions, and puts `secateur::Norm` and `secateur::Rotary` in their place.

A step of a small decoder spends as much time on such operators, a few numbers each, as on its sparse layers.
"""

from typing import Any

from secateur.deploy.onnx_graph.graph import OnnxGraph, attributes, other
from secateur.kernels.format import RMS_NORM

LAST = (-1, 3)
"""Numbers of the last of four dimensions."""


def fuse_norms(graph: OnnxGraph) -> int:
    """Replace x / sqrt(mean(x^2) + epsilon) * scale over the last dimension; returns how many."""
    found = [(node, norm) for node in graph.nodes if (norm := _norm(graph, node)) is not None]
    for node, (x, scale, epsilon) in found:
        graph.replace([node], "Norm", [x, scale], node.output[0], norm=RMS_NORM, epsilon=epsilon)
    return len(found)


def _norm(graph: OnnxGraph, last: Any) -> tuple[str, str, float] | None:
    """(x, scale, epsilon) of a norm that ends in a node, or None."""
    if last.op_type != "Mul" or last.domain not in ("", "ai.onnx"):
        return None
    scale = next((name for name in last.input if len(graph.shape(name) or ()) == 1 and name in graph.constants), None)
    if scale is None:
        return None
    product = graph.maker(other(last, scale), "Mul")
    root = next((r for r in (graph.maker(n, "Reciprocal") for n in (product.input if product else ())) if r), None)
    if product is None or root is None:
        return None
    x = other(product, root.output[0])
    inner = graph.maker(root.input[0], "Sqrt")
    plus = graph.maker(inner.input[0], "Add") if inner is not None else None
    mean = next((m for m in (graph.maker(n, "ReduceMean") for n in (plus.input if plus else ())) if m), None)
    square = graph.maker(mean.input[0], "Pow") if mean is not None else None
    if plus is None or mean is None or square is None or square.input[0] != x or graph.scalar(square.input[1]) != 2.0:
        return None
    epsilon, shape = graph.scalar(other(plus, mean.output[0])), graph.shape(x)
    axis = graph.scalar(mean.input[1]) if len(mean.input) > 1 else None
    if epsilon is None or shape is None or axis not in (-1, len(shape) - 1):
        return None
    width = shape[-1]
    if not attributes(mean).get("keepdims", 1) or not isinstance(width, int) or not graph.floats(scale, width):
        return None
    return x, scale, epsilon


def fuse_rotary(graph: OnnxGraph) -> int:
    """Replace x cos + turned(x) sin, with x as heads (batch, heads, tokens, width); returns how many."""
    found = [(node, inputs) for node in graph.nodes if (inputs := _rotary(graph, node)) is not None]
    for node, inputs in found:
        graph.replace([node], "Rotary", inputs, node.output[0])
    return len(found)


def _rotary(graph: OnnxGraph, add: Any) -> list[str] | None:
    """[x, cos, sin] of rotary positions that end in a node, or None."""
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
        return None
    products = [graph.maker(name, "Mul") for name in add.input]
    if None in products:
        return None
    for plain, turned in (products, products[::-1]):
        whole = next((c for c in (graph.maker(name, "Concat") for name in turned.input) if c), None)
        if whole is None or attributes(whole).get("axis") not in LAST or len(whole.input) != 2:
            continue
        minus, first = graph.maker(whole.input[0], "Neg"), graph.maker(whole.input[1], "Slice")
        second = graph.maker(minus.input[0], "Slice") if minus is not None else None
        if first is None or second is None or first.input[0] != second.input[0]:
            continue
        x = first.input[0]
        if x not in plain.input:
            continue
        cos, sin, shape = other(plain, x), other(turned, whole.output[0]), graph.shape(x)
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int) or shape[3] % 2:
            continue
        half = shape[3] // 2
        if (
            _bounds(graph, first) != (0, half)
            or _bounds(graph, second)[0] != half
            or _bounds(graph, second)[1] < 2 * half
        ):
            continue
        if all(_is_turn(graph, name, shape) for name in (cos, sin)) and graph.shape(cos) == graph.shape(sin):
            return [x, cos, sin]
    return None


def _is_turn(graph: OnnxGraph, name: str, shape: list[int | str]) -> bool:
    """Whether a value is (batch or 1, 1, tokens, width) for heads of that shape."""
    found = graph.shape(name)
    return found is not None and len(found) == 4 and found[0] in (1, shape[0]) and found[1:] == [1, *shape[2:]]


def _bounds(graph: OnnxGraph, cut: Any) -> tuple[float, float]:
    """Where a slice of the last dimension begins and ends; (-1, -1) for any other."""
    numbers = [graph.scalar(name) for name in cut.input[1:]]
    if len(numbers) < 3 or numbers[2] not in LAST or (len(numbers) > 3 and numbers[3] != 1):
        return -1, -1
    start, end = numbers[:2]
    return (-1, -1) if start is None or end is None else (start, end)
