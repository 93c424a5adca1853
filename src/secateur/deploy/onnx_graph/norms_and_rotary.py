"""Finds what decoders compute between their layers in an ONNX graph, as torch's exporter writes it: root mean square
norms and rotary positions, and puts `secateur::Norm` and `secateur::Rotary` in their place.

A step of a small decoder spends as much time on such operators, on a few numbers each, as on its sparse layers.
"""

from typing import Any

from secateur.deploy.onnx_graph.graph import LAST, OnnxGraph, attributes, is_standard, other
from secateur.kernels.format import RMS_NORM


def fuse_norms(graph: OnnxGraph) -> int:
    """Replace x / sqrt(mean(x^2) + epsilon) * scale over the last dimension; returns how many."""
    matches = [(node, norm) for node in graph.nodes if (norm := _norm(graph, node)) is not None]
    for node, (x, scale, epsilon) in matches:
        graph.replace([node], "Norm", [x, scale], node.output[0], norm=RMS_NORM, epsilon=epsilon)
    return len(matches)


def _norm(graph: OnnxGraph, last: Any) -> tuple[str, str, float] | None:
    """(x, scale, epsilon) of a norm that ends in a node, or None."""
    if not is_standard(last, "Mul"):
        return None
    scale = next((name for name in last.input if len(graph.shape(name) or ()) == 1 and name in graph.constants), None)
    if scale is None:
        return None
    product = graph.maker(other(last, scale), "Mul")
    root = graph.behind(product, "Reciprocal")
    if root is None:
        return None
    x = other(product, root.output[0])
    shape, epsilon = graph.shape(x), _epsilon(graph, root, x)
    if epsilon is None or not shape or not isinstance(shape[-1], int) or not graph.floats(scale, shape[-1]):
        return None
    return x, scale, epsilon


def _epsilon(graph: OnnxGraph, root: Any, x: str) -> float | None:
    """The epsilon of 1 / sqrt(mean(x^2) + epsilon) over the last dimension of x; None for anything else."""
    plus = graph.behind(root, "Sqrt", "Add")
    mean = graph.behind(plus, "ReduceMean")
    square = graph.behind(mean, "Pow")
    shape = graph.shape(x)
    if square is None or square.input[0] != x or graph.scalar(square.input[1]) != 2.0 or shape is None:
        return None
    axis = graph.scalar(mean.input[1]) if len(mean.input) > 1 else None
    if axis not in (-1, len(shape) - 1) or not attributes(mean).get("keepdims", 1):
        return None
    return graph.scalar(other(plus, mean.output[0]))


def fuse_rotary(graph: OnnxGraph) -> int:
    """Replace x cos + rotate_half(x) sin, with x as heads (batch, heads, tokens, width); returns how many."""
    matches = [(node, inputs) for node in graph.nodes if (inputs := _rotary(graph, node)) is not None]
    for node, inputs in matches:
        graph.replace([node], "Rotary", inputs, node.output[0])
    return len(matches)


def _rotary(graph: OnnxGraph, add: Any) -> list[str] | None:
    """[x, cos, sin] of rotary positions that end in a node, or None."""
    if not is_standard(add, "Add"):
        return None
    left, right = (graph.maker(name, "Mul") for name in add.input)
    if left is None or right is None:
        return None
    return _rotation(graph, left, right) or _rotation(graph, right, left)


def _rotation(graph: OnnxGraph, straight: Any, crossed: Any) -> list[str] | None:
    """[x, cos, sin] where two products are x cos and rotate_half(x) sin, or None."""
    concat = graph.behind(crossed, "Concat")
    x = _halves_of(graph, concat)
    if x is None or x not in straight.input:
        return None
    cos, sin = other(straight, x), other(crossed, concat.output[0])
    angles = all(_is_table(graph, name, graph.shape(x) or []) for name in (cos, sin))
    return [x, cos, sin] if angles and graph.shape(cos) == graph.shape(sin) else None


def _halves_of(graph: OnnxGraph, concat: Any) -> str | None:
    """The x (batch, heads, tokens, width) of rotate_half(x), which is (-second half, first half); or None."""
    if concat is None or attributes(concat).get("axis") not in LAST or len(concat.input) != 2:
        return None
    first, second = graph.maker(concat.input[1], "Slice"), graph.behind(graph.maker(concat.input[0], "Neg"), "Slice")
    if first is None or second is None or first.input[0] != second.input[0]:
        return None
    shape = graph.shape(first.input[0])
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int) or shape[3] % 2:
        return None
    half = shape[3] // 2
    start, end = _bounds(graph, second)
    return str(first.input[0]) if _bounds(graph, first) == (0, half) and start == half and end >= 2 * half else None


def _is_table(graph: OnnxGraph, name: str, shape: list[int | str]) -> bool:
    """Whether a value is (batch or 1, 1, tokens, width) for heads of that shape."""
    sizes = graph.shape(name)
    return sizes is not None and len(sizes) == 4 and sizes[0] in (1, shape[0]) and sizes[1:] == [1, *shape[2:]]


def _bounds(graph: OnnxGraph, cut: Any) -> tuple[float, float]:
    """Where a slice of the last dimension begins and ends; (-1, -1) for any other."""
    numbers = [graph.scalar(name) for name in cut.input[1:]]
    if len(numbers) < 3 or numbers[2] not in LAST or (len(numbers) > 3 and numbers[3] != 1):
        return -1, -1
    start, end = numbers[:2]
    return (-1, -1) if start is None or end is None else (start, end)
