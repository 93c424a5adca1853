"""Finds chains of sparse linear layers, norms and attention in a rewritten ONNX graph, and puts one
`secateur::SparseChain` in the place of each, which computes a whole encoder in the kernels' own layout.

A chain reads one value (batch, tokens, width), and masks, and returns one value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.deploy.onnx_graph.graph import DOMAIN, OnnxGraph, attributes, is_plain, is_standard
from secateur.kernels.format import ATTENTION, LAYER_NORM, LINEAR, NORM, describe
from secateur.kernels.packing import unpack
from secateur.kernels.steps import NONE, Op, pack_together, table

ALIGN = 64
"""Alignment of packed data in bytes, as in native/onnx/chain.h."""
GATE = 6
"""Number of the input of SparseLinear that its output is multiplied by; a chain has no step for a gate."""


@dataclass
class ChainNodes:
    """Nodes that follow one another.

    source: the value that the chain reads.
    values: the source, and what the nodes compute.
    masks: the two masks of every attention, and `heads` their number of heads, once the chain has one.
    """

    source: str
    nodes: list[Any] = field(default_factory=list)
    values: set[str] = field(default_factory=set)
    masks: tuple[str, str] | None = None
    heads: int = 0


def fuse_chains(graph: OnnxGraph) -> int:
    """Replace every chain that is found; returns how many."""
    count = 0
    graph.tidy()  # a node that nobody reads must not count as a reader
    candidates = [node for node in graph.nodes if _kind(graph, node)]
    while candidates:
        chain = _grown(graph, candidates)
        done = {id(candidates[0])}
        if len([node for node in chain.nodes if node.op_type == "SparseLinear"]) > 1:
            _replace(graph, chain)
            done |= {id(node) for node in chain.nodes}
            count += 1
        candidates = [node for node in candidates if id(node) not in done]
    return count


def _kind(graph: OnnxGraph, node: Any) -> str:
    """The operator's name if a chain could hold the node, or ''."""
    if is_standard(node, "LayerNormalization"):
        scale = graph.shape(node.input[1])
        fits = scale is not None and len(scale) == 1 and isinstance(scale[0], int) and is_plain(graph, node, scale[0])
        return node.op_type if fits else ""
    if node.domain != DOMAIN:
        return ""
    if node.op_type == "SparseLinear":
        gated = _input(node, GATE)
        return "" if gated or describe(_constant(graph, node.input[1])).format != "tiled" else node.op_type
    return node.op_type if node.op_type == "Attention" else ""


def _constant(graph: OnnxGraph, name: str) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(graph.constants[name])


def _input(node: Any, i: int) -> str:
    return node.input[i] if i < len(node.input) else ""


def _grown(graph: OnnxGraph, nodes: list[Any]) -> ChainNodes:
    """The longest chain that begins with the first of some nodes and has one output; without nodes where there is
    none.
    """
    source = nodes[0].input[0]
    chain = ChainNodes(source, values={source})
    shape = graph.shape(source)
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int) or nodes[0].op_type == "Attention":
        return chain
    for node in nodes:
        if not _joins(node, chain):
            continue
        chain.nodes.append(node)
        chain.values.add(node.output[0])
        if node.op_type == "Attention":
            chain.masks = (_input(node, 3), _input(node, 4))
            chain.heads = attributes(node)["heads"]
    while chain.nodes and _exits(graph, chain.nodes) != {chain.nodes[-1].output[0]}:
        chain.nodes.pop()
    return chain


def _joins(node: Any, chain: ChainNodes) -> bool:
    if node.op_type != "Attention":
        residual = _input(node, 3) if node.op_type == "SparseLinear" else ""
        return node.input[0] in chain.values and (not residual or residual in chain.values)
    masks = (_input(node, 3), _input(node, 4))
    if any(name not in chain.values for name in node.input[:3]) or any(name in chain.values for name in masks):
        return False
    return chain.masks in (None, masks) and chain.heads in (0, attributes(node)["heads"])


def _exits(graph: OnnxGraph, nodes: list[Any]) -> set[str]:
    """Values of nodes that other nodes read, or that are outputs of the graph."""
    inside = {id(node) for node in nodes}
    names = [node.output[0] for node in nodes]
    return {
        name for name in names if name in graph.kept or any(id(reader) not in inside for reader in graph.readers[name])
    }


def _replace(graph: OnnxGraph, chain: ChainNodes) -> None:
    steps = _merge_projections(_steps(graph, chain))
    output = chain.nodes[-1].output[0]
    packed, table, numbers = _pack(steps)
    constants = {"packed": packed, "steps": table, "numbers": numbers}
    names = [graph.add_constant(array, f"{output}.{kind}") for kind, array in constants.items()]
    width = (graph.shape(chain.source) or [])[2]
    graph.replace(chain.nodes, "SparseChain", [chain.source, *names, *(chain.masks or ())], output, width=width)


def _steps(graph: OnnxGraph, chain: ChainNodes) -> list[Op]:
    """The steps of a chain in order; step i writes value i + 1, and value 0 is what the chain reads."""
    value_of = {chain.source: 0}
    steps: list[Op] = []

    def floats(node: Any, i: int) -> np.ndarray | None:
        return _constant(graph, node.input[i]) if _input(node, i) else None

    for node in chain.nodes:
        has = attributes(node)
        if node.op_type == "Attention":
            reads = [value_of[name] for name in node.input[:3]]
            width = int((graph.shape(node.input[0]) or [])[2])
            heads = (has["heads"], has.get("kv_heads", has["heads"]), width // has["heads"])
            steps.append(Op(ATTENTION, reads, number=has.get("scale", 1.0), heads=heads))
        elif node.op_type == "LayerNormalization":
            steps.append(_norm(value_of[node.input[0]], NONE, floats(node, 1), floats(node, 2), LAYER_NORM, has))
        else:
            blob = _constant(graph, node.input[1])
            linear = Op(LINEAR, [value_of[node.input[0]]], weight=unpack(blob), value=describe(blob).value)
            linear.bias, linear.activation = floats(node, 2), has.get("activation", 0)
            steps.append(linear)
            residual, norm = _input(node, 3), has.get("norm", 0)
            if residual or norm:
                added = value_of[residual] if residual else NONE
                steps.append(_norm(len(steps), added, floats(node, 4), floats(node, 5), norm, has))
        value_of[node.output[0]] = len(steps)
    return steps


def _norm(
    value: int, added: int, scale: np.ndarray | None, shift: np.ndarray | None, norm: int, has: dict[str, Any]
) -> Op:
    return Op(NORM, [value, added], scale=scale, shift=shift, norm=norm, number=has.get("epsilon", 1e-5))


def _merge_projections(steps: list[Op]) -> list[Op]:
    """The steps with the layers that compute q, k and v as one layer, where one attention alone reads them and they
    read the same value.
    """
    rows: dict[int, tuple[int, int]] = {}
    for step in steps:
        if step.kind == ATTENTION and _mergeable(steps, step):
            rows |= _merge(steps, step.reads)
    return _renumber(steps, rows)


def _mergeable(steps: list[Op], attention: Op) -> bool:
    projections = [steps[value - 1] for value in attention.reads if value > 0]
    if len(projections) != 3 or len(set(attention.reads)) != 3:
        return False
    readers = sum(value in attention.reads for step in steps for value in step.reads)
    kinds = {(step.kind, tuple(step.reads), step.activation, step.value) for step in projections}
    return readers == 3 and len(kinds) == 1 and projections[0].kind == LINEAR and not projections[0].activation


def _merge(steps: list[Op], values: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Put the layers that compute some values into the last of them.

    Returns for each value the value that holds it then, and its first row there.
    """
    layers, last = [steps[value - 1] for value in values], max(values)
    weights = [layer.weight for layer in layers if layer.weight is not None]
    starts = np.cumsum([0, *map(len, weights)]).tolist()
    merged = steps[last - 1]
    if any(layer.bias is not None for layer in layers):
        zeros = [np.zeros(len(weight), np.float32) for weight in weights]
        biases = [zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)]
        merged.bias = np.concatenate(biases)
    merged.weight = np.concatenate(weights)
    return {value: (last, start) for value, start in zip(values, starts, strict=False)}


def _renumber(steps: list[Op], rows: Mapping[int, tuple[int, int]]) -> list[Op]:
    """The steps without those whose value another one holds; `rows` as `_merge` returns it, by old numbers."""
    number = {0: 0, NONE: NONE}
    kept: list[Op] = []
    for value, step in enumerate(steps, start=1):
        if rows.get(value, (value, 0))[0] != value:
            continue
        holders = [rows.get(read, (read, 0)) for read in step.reads]
        if step.kind == ATTENTION:
            q, k, v = (start for _, start in holders)
            step.first = q, k, v
        step.reads = [number[holder] for holder, _ in holders]
        kept.append(step)
        number[value] = len(kept)
    return kept


def _pack(steps: list[Op]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The packed weights and other arrays of steps, their table, and their numbers."""
    linear = [step for step in steps if step.weight is not None]
    for step, blob in zip(linear, pack_together([s.weight for s in linear], [s.value for s in linear]), strict=True):
        step.weight = blob
    parts: list[np.ndarray] = []

    def add(array: np.ndarray) -> tuple[int, int]:
        at = sum(len(part) for part in parts)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parts.append(np.concatenate([data, np.zeros(-len(data) % ALIGN, np.uint8)]))
        return at, len(data)

    rows, numbers = table(steps, add)
    return np.concatenate(parts), rows, numbers
