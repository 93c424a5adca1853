"""Finds softmax(q k^T + mask) v of several heads in an ONNX graph, as torch's exporter writes it, and puts
`secateur::Attention` in its place. The operator reads q, k and v as the linear layers return them, or as heads: those
of a cache, where keys and values are not repeated for the queries that share them.

A graph that does not look exactly like this stays as it is.
"""

from dataclasses import dataclass
from typing import Any

from secateur.deploy.onnx_graph.graph import LAST, OnnxGraph, attributes

SPLIT = [0, 2, 1, 3]
"""(batch, tokens, heads, width) to (batch, heads, tokens, width), and back."""
Sizes = list[int | str] | None


@dataclass(frozen=True)
class ProjectedHeads:
    """Where the heads of q, k or v come from.

    source: a value (batch, tokens, heads * width), or (batch, heads, tokens, width) as it is.
    tokens: the sizes of batch and tokens.
    """

    source: str
    heads: int
    width: int
    tokens: list[int | str]


@dataclass(frozen=True)
class Operands:
    """What an attention reads. scale: what the scores are multiplied by."""

    q: ProjectedHeads
    k: ProjectedHeads
    v: ProjectedHeads
    scale: float


def fuse_attention(graph: OnnxGraph) -> int:
    """Replace every attention that is found; returns how many."""
    return sum(_fuse(graph, softmax) for softmax in [node for node in graph.nodes if node.op_type == "Softmax"])


def _fuse(graph: OnnxGraph, softmax: Any) -> bool:
    """Replace the attention around a softmax, if there is one."""
    product, mask = _scores(graph, softmax.input[0])
    after = graph.only_reader(softmax.output[0], "MatMul")
    if attributes(softmax).get("axis", -1) not in LAST or product is None or after is None:
        return False
    operands = _operands(graph, product, after) if after.input[0] == softmax.output[0] else None
    if operands is None:
        return False
    out, keep, replaced = after.output[0], "", [softmax, after]
    where = graph.only_reader(out, "Where")
    if where is not None:  # queries without keys give zeros
        keep = _kept(graph, mask, where.input[0])
        if where.input[2] != out or graph.scalar(where.input[1]) != 0.0 or not keep:
            return False
        mask, out = "", where.output[0]
        replaced.append(where)
    q, k, v = operands.q, operands.k, operands.v
    merging = _merging(graph, out, [*q.tokens, q.heads * q.width])
    if not merging or not _is_mask(graph, mask) or not _is_mask(graph, keep):
        return False
    graph.replace(
        [*replaced, *merging],
        "Attention",
        [q.source, k.source, v.source, mask, keep],
        merging[-1].output[0],
        heads=q.heads,
        kv_heads=k.heads,
        scale=operands.scale,
    )
    return True


def _scores(graph: OnnxGraph, name: str) -> tuple[Any, str]:
    """The product q k^T behind scores, or None, and the mask that was added to it, or ''."""
    add = graph.maker(name, "Add")
    if add is None:
        return graph.maker(name, "MatMul"), ""
    product = next((term for term in add.input if graph.maker(term, "MatMul") is not None), None)
    if product is None:
        return None, ""
    return graph.maker(product, "MatMul"), next((term for term in add.input if term != product), product)


def _operands(graph: OnnxGraph, product: Any, after: Any) -> Operands | None:
    """q and k of the scores, and v of the product that follows, if their heads go together."""
    q_name, q_factor = _unscaled(graph, product.input[0])
    k_name, k_factor = _unscaled(graph, product.input[1])
    q, k, v = _heads(graph, q_name), _heads(graph, _untransposed(graph, k_name)), _heads(graph, after.input[1])
    if q is None or k is None or v is None:
        return None
    if q.width != k.width or (k.heads, k.width) != (v.heads, v.width) or q.heads % k.heads:
        return None
    return Operands(q, k, v, q_factor * k_factor)


def _merging(graph: OnnxGraph, name: str, shape: list[int | str]) -> list[Any]:
    """The two nodes that put heads (batch, heads, tokens, width) side by side, as a value of that shape; or []."""
    back = graph.only_reader(name, "Transpose")
    if back is None or attributes(back).get("perm") != SPLIT:
        return []
    merged = graph.only_reader(back.output[0], "Reshape")
    return [back, merged] if merged is not None and graph.shape(merged.output[0]) == shape else []


def _unscaled(graph: OnnxGraph, name: str) -> tuple[str, float]:
    """The value that is multiplied by a constant number, and that number; or the value itself and 1."""
    product = graph.maker(name, "Mul")
    for i in (0, 1):
        factor = graph.scalar(product.input[i]) if product is not None else None
        if factor is not None:
            return product.input[1 - i], factor
    return name, 1.0


def _untransposed(graph: OnnxGraph, name: str) -> str:
    """The value (batch, heads, tokens, width) that was transposed to (batch, heads, width, tokens); or ''.

    torch's exporter goes through (batch * heads, tokens, width), with shapes computed as the program runs: the value
    that q is multiplied by can then have no other order.
    """
    node = graph.maker(name, "Transpose")
    if node is not None:
        return node.input[0] if attributes(node).get("perm") == [0, 1, 3, 2] else ""
    middle = graph.behind(graph.maker(name, "Reshape"), "Transpose")
    inner = graph.behind(middle, "Reshape")
    return inner.input[0] if inner is not None and attributes(middle).get("perm") == [0, 2, 1] else ""


def _heads(graph: OnnxGraph, name: str) -> ProjectedHeads | None:
    """The value that (batch, heads, tokens, width) was split from or repeated from; None where the shape is unknown."""
    return _split(graph, name) or _whole(graph, _unrepeated(graph, name))


def _whole(graph: OnnxGraph, name: str) -> ProjectedHeads | None:
    """(batch, heads, tokens, width) as it is."""
    shape = graph.shape(name)
    if shape is None or len(shape) != 4 or name in graph.constants:
        return None
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    return ProjectedHeads(name, heads, width, [shape[0], shape[2]])


def _unrepeated(graph: OnnxGraph, name: str) -> str:
    """The value (batch, kv heads, tokens, width) whose heads were repeated, each equally often and copies side by side;
    or the value itself.
    """
    merged = graph.maker(name, "Reshape")
    expand = graph.behind(merged, "Expand")
    unsqueeze = graph.behind(expand, "Unsqueeze")
    if unsqueeze is None:
        return name
    shapes = [graph.shape(value) for value in (unsqueeze.input[0], expand.output[0], name)]
    # Sizes alone do not say where the new dimension stands when two are equal.
    return unsqueeze.input[0] if graph.scalar(unsqueeze.input[1]) == 2.0 and _repeats(*shapes) else name


def _repeats(few: Sizes, expanded: Sizes, many: Sizes) -> bool:
    """Whether (batch, n, ...) becomes (batch, n, repeats, ...) and then (batch, n * repeats, ...)."""
    if few is None or expanded is None or many is None or (len(few), len(expanded), len(many)) != (4, 5, 4):
        return False
    repeats = expanded[2]
    if not isinstance(few[1], int) or not isinstance(repeats, int):
        return False
    return [*expanded[:2], *expanded[3:]] == few and many == [few[0], few[1] * repeats, *few[2:]]


def _split(graph: OnnxGraph, name: str) -> ProjectedHeads | None:
    node = graph.maker(name, "Transpose")
    if node is None or attributes(node).get("perm") != SPLIT:
        return None
    split = graph.maker(node.input[0], "Reshape")
    if split is None:
        return None
    shape, source = graph.shape(split.output[0]), graph.shape(split.input[0])
    if shape is None or source is None or len(shape) != 4 or len(source) != 3:
        return None
    heads, width = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or source[2] != heads * width:
        return None
    return ProjectedHeads(split.input[0], heads, width, source[:2]) if source[:2] == shape[:2] else None


def _kept(graph: OnnxGraph, mask: str, empty: str) -> str:
    """The truth values (true: seen) from which both an added mask and the truth values `empty` (true: the query sees
    nothing) are computed; or ''.
    """
    product, less = graph.maker(mask, "Mul"), graph.maker(empty, "Less")
    cast = graph.behind(product, "Cast")
    inverse = graph.behind(cast, "Not")
    count = graph.maker(less.input[0], "ReduceSum") if less is not None else None
    counted = graph.behind(count, "Cast")
    if inverse is None or counted is None or counted.input[0] != inverse.input[0]:
        return ""
    lowest = next((graph.scalar(name) for name in product.input if name != cast.output[0]), None)
    return inverse.input[0] if lowest is not None and lowest <= -1e30 else ""


def _is_mask(graph: OnnxGraph, name: str) -> bool:
    """Whether the operator takes a value as its mask: four dimensions, the last as long as the keys; or left out."""
    if not name:
        return True
    shape = graph.shape(name)
    return shape is not None and len(shape) == 4 and shape[3] != 1
