"""Finds chains of sparse linear layers, norms and attention in a rewritten ONNX graph, and puts one
`secateur::SparseChain` in the place of each, which computes a whole encoder without leaving the kernels' own layout.

A chain reads one value (batch, tokens, width) and gives one; only masks come in besides.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.deploy.onnx_graph.graph import DOMAIN, OnnxGraph, attributes, is_plain
from secateur.kernels.format import ATTENTION, LAYER_NORM, LINEAR, NORM, describe
from secateur.kernels.packing import unpack
from secateur.kernels.steps import NONE, Op, pack_together, table

ALIGN = 64
"""Of what is packed, as native/onnx/chain.h has it."""


GATE = 6
"""Which input of SparseLinear its output is multiplied by; a chain has no step for that."""


@dataclass
class ChainNodes:
    """Nodes that follow one another."""

    source: str
    nodes: list[Any] = field(default_factory=list)
    values: set[str] = field(default_factory=set)
    masks: tuple[str, str] | None = None
    heads: int = 0


def fuse_chains(graph: OnnxGraph) -> int:
    """Replace every chain that is found; returns how many."""
    found = 0
    graph.tidy()  # what nobody reads must not count as a reader
    left = [node for node in graph.nodes if _kind(graph, node)]
    while left:
        chain = _grown(graph, left)
        taken = {id(left[0])}
        if len([node for node in chain.nodes if node.op_type == "SparseLinear"]) > 1:
            _replace(graph, chain)
            taken |= {id(node) for node in chain.nodes}
            found += 1
        left = [node for node in left if id(node) not in taken]
    return found


def _kind(graph: OnnxGraph, node: Any) -> str:
    """The operator's name if a chain could hold the node, or ''."""
    if node.op_type == "LayerNormalization" and node.domain in ("", "ai.onnx"):
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
    """The longest chain that begins with the first of some nodes and has one end; perhaps without nodes."""
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
    """Values of nodes that others see."""
    inside = {id(node) for node in nodes}
    names = [node.output[0] for node in nodes]
    return {
        name for name in names if name in graph.kept or any(id(reader) not in inside for reader in graph.readers[name])
    }


def _replace(graph: OnnxGraph, chain: ChainNodes) -> None:
    steps = _merged(_steps(graph, chain))
    output = chain.nodes[-1].output[0]
    packed, table, numbers = _written(steps)
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
            width = graph.shape(node.input[0])
            assert width is not None
            heads = (has["heads"], has.get("kv_heads", has["heads"]), int(width[2]) // has["heads"])
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
                beside = value_of[residual] if residual else NONE
                steps.append(_norm(len(steps), beside, floats(node, 4), floats(node, 5), norm, has))
        value_of[node.output[0]] = len(steps)
    return steps


def _norm(
    value: int, beside: int, scale: np.ndarray | None, shift: np.ndarray | None, norm: int, has: dict[str, Any]
) -> Op:
    return Op(NORM, [value, beside], scale=scale, shift=shift, norm=norm, number=has.get("epsilon", 1e-5))


def _merged(steps: list[Op]) -> list[Op]:
    """Linear layers that one attention alone reads, and which read the same value, as one layer."""
    moved: dict[int, tuple[int, int]] = {}  # value: the value that holds it now, by its old number, and its first row
    gone: set[int] = set()
    for step in steps:
        parts = [steps[value - 1] for value in step.reads if value > 0]
        if step.kind != ATTENTION or len(parts) != 3 or len(set(step.reads)) != 3:
            continue
        readers = sum(value in step.reads for other in steps for value in other.reads)
        alike = {(part.kind, tuple(part.reads), part.activation, part.value) for part in parts}
        if readers != 3 or len(alike) != 1 or parts[0].kind != LINEAR or parts[0].activation:
            continue
        weights = [part.weight for part in parts if part.weight is not None]
        rows = [len(weight) for weight in weights]
        last = max(step.reads)
        into = steps[last - 1]
        if any(part.bias is not None for part in parts):
            zeros = [np.zeros(n, np.float32) for n in rows]
            into.bias = np.concatenate([z if p.bias is None else p.bias for p, z in zip(parts, zeros, strict=True)])
        into.weight = np.concatenate(weights)
        for i, value in enumerate(step.reads):
            moved[value] = last, sum(rows[:i])
            if value != last:
                gone.add(value)
    number = {0: 0, NONE: NONE}
    kept: list[Op] = []
    for value, step in enumerate(steps, start=1):
        if value in gone:
            continue
        if step.kind == ATTENTION:
            a, b, c = (moved.get(old, (old, 0))[1] for old in step.reads)
            step.first = a, b, c
        step.reads = [number[moved.get(old, (old, 0))[0]] for old in step.reads]
        kept.append(step)
        number[value] = len(kept)
    return kept


def _written(steps: list[Op]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is packed, the table of steps and their numbers."""
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
