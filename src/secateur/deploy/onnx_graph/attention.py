"""Finds softmax(q k^T + mask) v of several heads in an ONNX graph, as torch's exporter writes it, and puts
`secateur::Attention` in its place, which reads q, k and v as the linear layers give them, or as heads: from a cache,
where keys and values are not repeated for the queries that share them.

What does not look exactly like it stays as it is.
"""

from dataclasses import dataclass
from typing import Any

from secateur.deploy.onnx_graph.graph import OnnxGraph, attributes

SPLIT = [0, 2, 1, 3]
"""(batch, tokens, heads, width) to (batch, heads, tokens, width), and back."""


@dataclass(frozen=True)
class ProjectedHeads:
    """Where the heads of q, k or v come from: a value (batch, tokens, heads * width), or (batch, heads, tokens, width)
    as it is; and the first two sizes of the former."""

    source: str
    heads: int
    width: int
    tokens: list[int | str]


def fuse_attention(graph: OnnxGraph) -> int:
    """Replace every attention that is found; returns how many."""
    found = 0
    for softmax in [node for node in graph.nodes if node.op_type == "Softmax"]:
        found += _fuse(graph, softmax)
    return found


def _fuse(graph: OnnxGraph, softmax: Any) -> bool:
    if attributes(softmax).get("axis", -1) not in (-1, 3):
        return False
    scores, mask = softmax.input[0], ""
    add = graph.maker(scores, "Add")
    if add is not None:
        product = next((name for name in add.input if graph.maker(name, "MatMul") is not None), None)
        if product is None:
            return False
        scores, mask = product, next((name for name in add.input if name != product), product)
    product = graph.maker(scores, "MatMul")
    after = graph.only_reader(softmax.output[0], "MatMul")
    if product is None or after is None or after.input[0] != softmax.output[0]:
        return False
    q_name, q_factor = _unscaled(graph, product.input[0])
    k_name, k_factor = _unscaled(graph, product.input[1])
    q, k, v = _heads(graph, q_name), _heads(graph, _untransposed(graph, k_name)), _heads(graph, after.input[1])
    if q is None or k is None or v is None or q.width != k.width or (k.heads, k.width) != (v.heads, v.width):
        return False
    if q.heads % k.heads:
        return False
    out, keep, taken = after.output[0], "", [softmax, after]
    where = graph.only_reader(out, "Where")
    if where is not None:  # queries without keys give zeros
        if where.input[2] != out or graph.scalar(where.input[1]) != 0.0:
            return False
        keep = _kept(graph, mask, where.input[0])
        if not keep:
            return False
        mask, out = "", where.output[0]
        taken.append(where)
    if not _is_mask(graph, mask) or not _is_mask(graph, keep):
        return False
    back = graph.only_reader(out, "Transpose")
    if back is None or attributes(back).get("perm") != SPLIT:
        return False
    merged = graph.only_reader(back.output[0], "Reshape")
    if merged is None:
        return False
    if graph.shape(merged.output[0]) != [*q.tokens, q.heads * q.width]:
        return False
    graph.replace(
        [*taken, back, merged],
        "Attention",
        [q.source, k.source, v.source, mask, keep],
        merged.output[0],
        heads=q.heads,
        kv_heads=k.heads,
        scale=q_factor * k_factor,
    )
    return True


def _unscaled(graph: OnnxGraph, name: str) -> tuple[str, float]:
    """A value without the number that it is multiplied by, and that number."""
    product = graph.maker(name, "Mul")
    for i in (0, 1):
        factor = graph.scalar(product.input[i]) if product is not None else None
        if factor is not None:
            return product.input[1 - i], factor
    return name, 1.0


def _untransposed(graph: OnnxGraph, name: str) -> str:
    """(batch, heads, tokens, width) behind (batch, heads, width, tokens); or ''.

    torch's exporter goes through (batch * heads, tokens, width), with shapes computed as the program runs: what q is
    multiplied by can then have no other order.
    """
    node = graph.maker(name, "Transpose")
    if node is not None:
        return node.input[0] if attributes(node).get("perm") == [0, 1, 3, 2] else ""
    outer = graph.maker(name, "Reshape")
    middle = graph.maker(outer.input[0], "Transpose") if outer is not None else None
    inner = graph.maker(middle.input[0], "Reshape") if middle is not None else None
    return inner.input[0] if inner is not None and attributes(middle).get("perm") == [0, 2, 1] else ""


def _heads(graph: OnnxGraph, name: str) -> ProjectedHeads | None:
    """What (batch, heads, tokens, width) was split from, or repeated from."""
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
    """The value (batch, kv heads, tokens, width) whose heads were repeated, each as often as the others, one after the
    other; or the value itself."""
    merged = graph.maker(name, "Reshape")
    expand = graph.maker(merged.input[0], "Expand") if merged is not None else None
    opened = graph.maker(expand.input[0], "Unsqueeze") if expand is not None else None
    if expand is None or opened is None:
        return name
    few, wide, many = (graph.shape(value) for value in (opened.input[0], expand.output[0], name))
    if few is None or wide is None or many is None or len(few) != 4 or len(wide) != 5 or len(many) != 4:
        return name
    repeats = wide[2]
    same = [wide[0], wide[1], *wide[3:]] == few and [many[0], *many[2:]] == [few[0], *few[2:]]
    if not same or not isinstance(few[1], int) or not isinstance(repeats, int) or many[1] != few[1] * repeats:
        return name
    # Sizes alone do not tell where the new dimension stands when two are equal.
    return opened.input[0] if graph.scalar(opened.input[1]) == 2.0 else name


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
    """The truth values (true: seen) behind an added mask and behind the queries that see nothing; or ''."""
    product = graph.maker(mask, "Mul")
    cast = next((c for c in (graph.maker(name, "Cast") for name in (product.input if product else ())) if c), None)
    inverse = graph.maker(cast.input[0], "Not") if cast is not None else None
    if product is None or cast is None or inverse is None:
        return ""
    lowest = next((graph.scalar(name) for name in product.input if name != cast.output[0]), None)
    less = graph.maker(empty, "Less")
    count = graph.maker(less.input[0], "ReduceSum") if less is not None else None
    counted = graph.maker(count.input[0], "Cast") if count is not None else None
    if lowest is None or lowest > -1e30 or counted is None or counted.input[0] != inverse.input[0]:
        return ""
    return inverse.input[0]


def _is_mask(graph: OnnxGraph, name: str) -> bool:
    """Whether a value is as the operator takes masks: four dimensions, keys in full; or left out."""
    if not name:
        return True
    shape = graph.shape(name)
    return shape is not None and len(shape) == 4 and shape[3] != 1
