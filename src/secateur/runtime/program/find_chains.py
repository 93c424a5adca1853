"""Finds blocks of a traced model that are chains: linear layers, activations, sums, norms and attention from one stream
(batch, tokens, width) to one stream, with no other input than a mask of attention. It reads the graph, never the
classes of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from secateur.kernels.format import ACTIVATIONS, ATTENTION, LINEAR, NORM
from secateur.kernels.format import NORMS as NORM_NAMES
from secateur.kernels.steps import NONE, Op
from secateur.runtime.program.from_fx import (
    CHECKS,
    COPIES,
    NORMS,
    ModuleCall,
    Traced,
    activation_of,
    arguments,
    aten,
    epsilon_of,
    positional,
    stack,
)

CONSTANTS = (bool, int, float, str)
_RESHAPES = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)


@dataclass(frozen=True)
class BlockSignature:
    """How a block is called, and what it returns. Field names are keys of runtime.json in saved folders.

    - `names`: the parameters that may be passed by position
    - `x`: the parameter that is the stream
    - `mask`: the parameter that is the mask of attention; '' for none
    - `tensors`: other parameters that are tensors; the block does not read them
    - `constants`: all other arguments
    - `given`: the length of the tuple that the block returns (the stream, then None); 0 where it returns the stream
    """

    names: tuple[str, ...]
    x: str
    mask: str
    tensors: tuple[str, ...]
    constants: dict[str, Any]
    given: int


@dataclass(frozen=True)
class ChainBlock:
    """A block that is a chain.

    - `path`: its path in the model
    - `signature`: how it is called
    - `steps`: its steps, which read `source` as value 0; weights, biases, scales and shifts are paths in the model
    - `source`, `exit`: the nodes of the stream that it reads and of the stream that it returns
    - `mask`: the node of the mask of attention, or None
    - `heads`: the query heads of every attention; 0 where nothing attends
    - `folds`: paths of weights whose outputs are multiplied by a parameter -> the path of that parameter
    """

    path: str
    signature: BlockSignature
    steps: list[Op]
    source: Node
    exit: Node
    mask: Node | None
    heads: int
    folds: dict[str, str]


class NoChainError(Exception):
    """Why a block is not a chain, as the end of a sentence that begins with its path."""


def find_blocks(traced: Traced, read: Callable[..., Any] | None = None) -> tuple[list[Any], dict[str, str]]:
    """The blocks of module lists that are chains, and why other blocks with at least two linear layers are not.

    The blocks stand in the order of the model, without blocks inside others. `read(traced, path, nodes)` makes the
    reader of a block, a `ChainReader` by default.
    """
    read = read or ChainReader
    blocks: list[Any] = []
    refused: dict[str, str] = {}
    for path, module in traced.modules.items():
        parent, _, last = path.rpartition(".")
        is_listed = isinstance(traced.modules.get(parent), nn.ModuleList | nn.Sequential) and last.isdigit()
        if not is_listed or any(path.startswith(f"{block.path}.") for block in blocks):
            continue
        nodes = [node for node in traced.operations if path in stack(node) and node.target not in CHECKS]
        if sum(node.target is aten.linear.default for node in nodes) < 2:
            continue
        try:
            blocks.append(read(traced, path, nodes).block(module))
        except NoChainError as reason:
            refused[path] = str(reason)
    return blocks, refused


@dataclass(frozen=True)
class HeadSplit:
    """A value seen as heads.

    - `value`: the number of the value
    - `heads`, `width`: how many heads, and the numbers of a head
    - `factor`: what the value is multiplied by
    - `transposed`: (batch, heads, tokens, width) rather than (batch, tokens, heads, width)
    """

    value: int
    heads: int
    width: int
    factor: float
    transposed: bool = False


class ChainReader:
    """Reads the operations of one block in order and writes its steps.

    - `values`: nodes (batch, tokens, rows) -> the numbers of their values
    - `factors`: nodes that are a value multiplied by a number -> (value, number)
    - `split`: nodes that are a value seen as heads
    - `readers`: operation -> the method that reads it; it returns False where it cannot
    - `causal`: attention may see earlier tokens only
    """

    readers: Mapping[Any, Callable[[Any, Node, dict[str, Any]], bool]] = {}
    causal = False

    def __init__(self, traced: Traced, path: str, nodes: list[Node]):
        self.traced, self.path, self.nodes = traced, path, nodes
        self.steps: list[Op] = []
        self.split: dict[Node, HeadSplit] = {}
        self.factors: dict[Node, tuple[int, float]] = {}
        self.folds: dict[str, str] = {}
        self.heads = 0
        masks, streams = self._from_outside()
        if len(masks) > 1 or len(streams) != 1:
            names = ", ".join(sorted(node.name for node in streams | masks))
            raise NoChainError(f"reads more than one stream and one mask ({names})")
        self.mask = next(iter(masks), None)
        self.source = next(iter(streams))
        if not is_stream(self.source):
            raise NoChainError("reads no float32 stream (batch, tokens, width)")
        self.values = {self.source: 0}

    def _from_outside(self) -> tuple[set[Node], set[Node]]:
        """Masks of attention, and all other nodes that are computed outside and read inside."""
        inside = {*self.nodes}
        masks: set[Node] = set()
        others: set[Node] = set()
        for node in self.nodes:
            mask = node.args[3] if _attends(node) and len(node.args) > 3 else node.kwargs.get("attn_mask")
            for value in node.all_input_nodes:
                if value in inside or self.traced.parameter(value):
                    continue
                (masks if value is mask else others).add(value)
        return masks, others

    def block(self, module: nn.Module) -> ChainBlock:
        """Read the block.

        Raises:
            NoChainError: when it is not a chain.
        """
        self._read_all(self.nodes)
        end = self._exit()
        return ChainBlock(
            self.path, self._signature(module), self.steps, self.source, end, self.mask, self.heads, self.folds
        )

    def _read_all(self, nodes: list[Node]) -> None:
        if not all(self.traced.is_free(inner) for inner in self.traced.within(self.path)):
            raise NoChainError("has hooks, or stands in more than one place")
        for node in nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        reader = self.readers.get(node.target)
        if reader is None and activation_of(node):
            reader = ChainReader._activation
        if reader is None and node.target in NORMS:
            reader = ChainReader._norm
        if reader is None or not reader(self, node, arguments(node)):
            name = getattr(node.target, "__name__", str(node.target))
            raise NoChainError(f"computes {name} in {stack(node)[-1]}, which a chain has no step for")

    def _value(self, node: Any) -> int | None:
        return self.values.get(node) if isinstance(node, Node) else None

    def _write(self, node: Node, step: Op) -> bool:
        self.steps.append(step)
        self.values[node] = len(self.steps)
        return True

    def _write_heads(self, node: Node, step: Op, *, transposed: bool) -> bool:
        """Write a step whose value (heads x width numbers a token) is seen as heads."""
        self.steps.append(step)
        self.split[node] = HeadSplit(len(self.steps), step.heads[0], step.heads[2], 1.0, transposed)
        return True

    def _parameter(self, node: Any, rows: int) -> str | None:
        """The path of a float32 parameter (rows)."""
        path = self.traced.parameter(node)
        fits = path and node.meta["val"].dtype == torch.float32 and tuple(node.meta["val"].shape) == (rows,)
        return path if fits else None

    def _linear(self, node: Node, has: dict[str, Any]) -> bool:
        x, weight, bias = self._value(has["input"]), self.traced.parameter(has["weight"]), has["bias"]
        if x is None or not weight or not weight.endswith(".weight"):
            return False
        layer = weight.removesuffix("weight")
        if bias is not None and self.traced.parameter(bias) != f"{layer}bias":
            return False
        return self._write(node, Op(LINEAR, [x], weight=f"{layer}packed", bias=f"{layer}bias" if bias else None))

    def _linear_before(self, node: Any) -> Op | None:
        """The linear step, as yet without activation or factor, that computes a value with a single reader."""
        value = self._value(node)
        step = self.steps[value - 1] if value and len(node.users) == 1 else None
        is_plain = step is not None and step.kind == LINEAR and not step.activation and step.weight not in self.folds
        return step if is_plain else None

    def _scaled(self, node: Node, has: dict[str, Any]) -> bool:
        """The output of a linear layer times a number, before it is split into heads, or times a parameter."""
        for before, by in ((has["self"], has["other"]), (has["other"], has["self"])):
            step = self._linear_before(before)
            if step is None:
                continue
            if isinstance(by, int | float):
                self.factors[node] = self.values[before], float(by)
                return True
            scale = self._parameter(by, before.meta["val"].shape[-1])
            if scale is not None:
                self.folds[step.weight] = scale
                self.values[node] = self.values[before]
                return True
        return False

    def _activation(self, node: Node, has: dict[str, Any]) -> bool:
        (before,) = node.all_input_nodes
        step = self._linear_before(before)
        if step is None:
            return False
        step.activation = ACTIVATIONS.index(activation_of(node))
        self.values[node] = self.values[before]
        return True

    def _add(self, node: Node, has: dict[str, Any]) -> bool:
        a, b = self._value(has["self"]), self._value(has["other"])
        if a is None or b is None or has["alpha"] != 1 or not is_stream(node):
            return False
        if has["self"].meta["val"].shape != has["other"].meta["val"].shape:
            return False
        return self._write(node, Op(NORM, [a, b]))

    def _norm(self, node: Node, has: dict[str, Any]) -> bool:
        value, rows = self._value(has["input"]), node.meta["val"].shape[-1]
        if value is None or list(has["normalized_shape"]) != [rows]:
            return False
        nodes = [has.get("weight"), has.get("bias")]
        paths = [None if each is None else self._parameter(each, rows) for each in nodes]
        if any(path is None for each, path in zip(nodes, paths, strict=True) if each is not None):
            return False
        norm = Op(NORM, [value, NONE], scale=paths[0], shift=paths[1], number=epsilon_of(node))
        norm.norm = NORM_NAMES.index(NORMS[node.target])
        if self._is_last_sum(value) and len(has["input"].users) == 1:
            norm.reads = self.steps.pop().reads
        return self._write(node, norm)

    def _is_last_sum(self, value: int) -> bool:
        """Whether the last step is a sum without a norm, and gives this value."""
        return bool(value) and value == len(self.steps) and self.steps[-1].kind == NORM and not self.steps[-1].norm

    def _same(self, node: Node, has: dict[str, Any]) -> bool:
        """An operation that changes nothing: a copy, a cast to the same type, dropout outside of training."""
        before = node.all_input_nodes[0]
        if has.get("train") or node.meta["val"].dtype != before.meta["val"].dtype:
            return False
        return self._alias(node, before)

    def _alias(self, node: Node, before: Node) -> bool:
        tables: list[dict[Node, Any]] = [self.values, self.factors, self.split]
        for table in tables:
            if before in table:
                table[node] = table[before]
                return True
        return False

    def _reshaped(self, node: Node, has: dict[str, Any]) -> bool:
        """A value split into heads, or heads joined into a value."""
        before = node.all_input_nodes[0]
        old, new = tuple(before.meta["val"].shape), tuple(node.meta["val"].shape)
        if old == new:
            return self._alias(node, before)
        value, factor = self.factors.get(before, (self._value(before), 1.0))
        if value is not None and len(new) == 4 and old[:2] == new[:2]:
            self.split[node] = HeadSplit(value, new[2], new[3], factor)
            return True
        heads = self.split.get(before)
        if heads is None or heads.transposed or heads.factor != 1 or new != (*old[:2], old[2] * old[3]):
            return False
        self.values[node] = heads.value
        return True

    def _transposed(self, node: Node, has: dict[str, Any]) -> bool:
        """Heads whose dimensions of heads and tokens change places."""
        heads = self.split.get(node.all_input_nodes[0])
        swapped = sorted(axis % 4 for axis in (has["dim0"], has["dim1"])) if "dim0" in has else None
        fits = swapped == [1, 2] or [axis % 4 for axis in has.get("dims") or ()] == [0, 2, 1, 3]
        if heads is None or not fits:
            return False
        self.split[node] = replace(heads, transposed=not heads.transposed)
        return True

    def _attention(self, node: Node, has: dict[str, Any]) -> bool:
        q, k, v = (self.split.get(has[name]) for name in ("query", "key", "value"))
        if q is None or k is None or v is None or not _fit_together(q, k, v):
            return False
        if has["dropout_p"] or (has["is_causal"] and not self.causal):
            return False
        if self.heads not in (0, q.heads) or (has["attn_mask"] is None) != (self.mask is None):
            return False
        self.heads = q.heads
        scale = (q.width**-0.5 if has["scale"] is None else float(has["scale"])) * q.factor * k.factor
        step = Op(ATTENTION, [q.value, k.value, v.value], number=scale, heads=(q.heads, k.heads, q.width))
        return self._write_heads(node, step, transposed=True)

    def _exit(self) -> Node:
        inside = {*self.nodes}
        exits = [n for n in self.nodes if any(u not in inside and u.target not in CHECKS for u in n.users)]
        if len(exits) != 1 or self.values.get(exits[0]) != len(self.steps) or not is_stream(exits[0]):
            raise NoChainError("gives more than the stream" if len(exits) > 1 else "does not end in a stream")
        return exits[0]

    def _call(self) -> ModuleCall:
        """The only call of the block in the trace."""
        call = self.traced.calls.get(self.path)
        if call is None:
            raise NoChainError("is called in a way that cannot be told")
        if call.times > 1:
            raise NoChainError("is called more than once")
        return call

    def _masks(self, inputs: Mapping[str, Any]) -> list[str]:
        """The names of the arguments that are masks of attention."""
        return [name for name, value in inputs.items() if any(value is mask for mask in self.traced.masks)]

    def _signature(self, module: nn.Module) -> BlockSignature:
        call = self._call()
        tensors = {name: value for name, value in call.inputs.items() if isinstance(value, torch.Tensor)}
        constants = {name: value for name, value in call.inputs.items() if name not in tensors}
        refuse_other_types(constants)
        masks = self._masks(tensors)
        if (self.mask is None) != (not masks) or len(masks) > 1:
            raise NoChainError("makes its mask of attention itself")
        like = self.source.meta["val"]
        streams = [n for n, v in tensors.items() if n not in masks and v.shape == like.shape and v.dtype == like.dtype]
        if len(streams) != 1:
            raise NoChainError(f"is called with {len(streams)} tensors that may be its stream")
        others = tuple(name for name in tensors if name not in (*masks, *streams))
        mask = masks[0] if masks else ""
        return BlockSignature(positional(module), streams[0], mask, others, constants, output_length(call.output))


def refuse_other_types(constants: Mapping[str, Any]) -> None:
    """Check that arguments are plain constants or None.

    Raises:
        NoChainError: when one is not.
    """
    for name, value in constants.items():
        if value is not None and not isinstance(value, CONSTANTS):
            raise NoChainError(f"is called with {name}, a {type(value).__name__}")


def output_length(output: Any) -> int:
    """The field `given` of a BlockSignature for what a block returns.

    Raises:
        NoChainError: when the block returns more than its stream.
    """
    if isinstance(output, torch.Tensor):
        return 0
    has_stream = type(output) is tuple and output and isinstance(output[0], torch.Tensor)
    if not has_stream or any(item is not None for item in output[1:]):
        raise NoChainError(f"returns a {type(output).__name__} of more than its stream")
    return len(output)


def _attends(node: Node) -> bool:
    return node.target is aten.scaled_dot_product_attention.default


def _fit_together(q: HeadSplit, k: HeadSplit, v: HeadSplit) -> bool:
    """Whether attention can be computed from these queries, keys and values."""
    if not (q.transposed and k.transposed and v.transposed) or v.factor != 1:
        return False
    return q.width == k.width and (k.heads, k.width) == (v.heads, v.width) and q.heads % k.heads == 0


def is_stream(node: Node) -> bool:
    """Whether a value is (batch, tokens, width) in float32."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.dtype == torch.float32


ChainReader.readers = {
    aten.linear.default: ChainReader._linear,
    aten.add.Tensor: ChainReader._add,
    aten.mul.Tensor: ChainReader._scaled,
    aten.mul.Scalar: ChainReader._scaled,
    aten.dropout.default: ChainReader._same,
    aten.transpose.int: ChainReader._transposed,
    aten.permute.default: ChainReader._transposed,
    aten.scaled_dot_product_attention.default: ChainReader._attention,
    **dict.fromkeys(COPIES, ChainReader._same),
    **dict.fromkeys(_RESHAPES, ChainReader._reshaped),
}
