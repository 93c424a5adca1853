"""Finds blocks of a traced model that are chains: linear layers, activations, sums, norms and attention from one
stream to one stream, with nothing from outside but a mask of attention. It goes by the graph, never by what classes are
called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from secateur.kernels.packing import ACTIVATIONS
from secateur.kernels.packing import NORMS as NORM_NAMES
from secateur.kernels.steps import ATTENTION, LINEAR, NONE, NORM, Op
from secateur.runtime.program.from_fx import (
    CHECKS,
    COPIES,
    NORMS,
    Traced,
    activation_of,
    arguments,
    aten,
    epsilon_of,
    positional,
    stack,
)

CONSTANTS = (bool, int, float, str)
_SHAPED = (aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints)


@dataclass(frozen=True)
class BlockSignature:
    """How a block is called, and what it gives: `names` are the arguments by position, `x` the one that is the stream,
    `mask` the one that is the mask of attention ('' for none), `tensors` others that are tensors and make no
    difference, `constants` what the rest was. `given` is the length of the tuple that it returns, with the stream first
    and nothing after it, or 0 for the stream itself.
    """

    names: tuple[str, ...]
    x: str
    mask: str
    tensors: tuple[str, ...]
    constants: dict[str, Any]
    given: int


@dataclass(frozen=True)
class ChainBlock:
    """A block that is a chain. `steps` read value 0, `source`, and give `exit`; weights and the like are paths of
    tensors in the model. `heads` is 0 where nothing attends; `folds` are weights (paths) whose outputs are multiplied
    by a parameter (path), which the steps leave to them.
    """

    path: str
    form: BlockSignature
    steps: list[Op]
    source: Node
    exit: Node
    mask: Node | None
    heads: int
    folds: dict[str, str]


class NoChainError(Exception):
    """Why a block is none, as the end of a sentence that begins with its path."""


def blocks(traced: Traced, reading: Callable[..., Any] | None = None) -> tuple[list[Any], dict[str, str]]:
    """The blocks of module lists that are chains (or what another `reading` makes of them), outermost ones only, in the
    order of the model; and why others with at least two linear layers are none.
    """
    reading = reading or ChainReader
    found: list[Any] = []
    refused: dict[str, str] = {}
    for path, module in traced.modules.items():
        parent, _, last = path.rpartition(".")
        listed = isinstance(traced.modules.get(parent), nn.ModuleList | nn.Sequential) and last.isdigit()
        if not listed or any(path.startswith(f"{other}.") for other in [b.path for b in found]):
            continue
        nodes = [node for node in traced.operations if path in stack(node) and node.target not in CHECKS]
        if sum(node.target is aten.linear.default for node in nodes) < 2:
            continue
        try:
            found.append(reading(traced, path, nodes).block(module))
        except NoChainError as reason:
            refused[path] = str(reason)
    return found, refused


@dataclass(frozen=True)
class HeadSplit:
    """A value seen as heads: (batch, tokens, heads, width), or (batch, heads, tokens, width) where it is `turned`."""

    value: int
    heads: int
    width: int
    factor: float
    turned: bool = False


class ChainReader:
    """Goes through the operations of one block and writes its steps. `values` are nodes (batch, tokens, rows) by the
    number of their value, `factors` those that are a value multiplied by a number, `split` those seen as heads.
    `readers` are the operations that it knows; `causal` tells whether attention may see earlier tokens only."""

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
        """Masks of attention, and whatever else is computed outside and read inside."""
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
        """What the block is.

        Raises:
            NoChainError: when it is none.
        """
        if not all(self.traced.is_free(each) for each in self.traced.within(self.path)):
            raise NoChainError("has hooks, or stands in more than one place")
        for node in self.nodes:
            self._read(node)
        end = self._exit()
        return ChainBlock(
            self.path, self._form(module), self.steps, self.source, end, self.mask, self.heads, self.folds
        )

    def _read(self, node: Node) -> None:
        kind = self.readers.get(node.target)
        if kind is None and activation_of(node):
            kind = ChainReader._activation
        if kind is None and node.target in NORMS:
            kind = ChainReader._norm
        if kind is None or not kind(self, node, arguments(node)):
            name = getattr(node.target, "__name__", str(node.target))
            raise NoChainError(f"computes {name} in {stack(node)[-1]}, which a chain has no step for")

    def _value(self, node: Any) -> int | None:
        return self.values.get(node) if isinstance(node, Node) else None

    def _write(self, node: Node, step: Op) -> bool:
        self.steps.append(step)
        self.values[node] = len(self.steps)
        return True

    def _part(self, node: Any, rows: int) -> str | None:
        """The path of a float32 parameter (rows)."""
        path = self.traced.parameter(node)
        fits = path and node.meta["val"].dtype == torch.float32 and tuple(node.meta["val"].shape) == (rows,)
        return path if fits else None

    def _linear(self, node: Node, has: dict[str, Any]) -> bool:
        x, weight = self._value(has["input"]), self.traced.parameter(has["weight"])
        if x is None or not weight or not weight.endswith(".weight"):
            return False
        bias = has["bias"]
        if bias is not None and self.traced.parameter(bias) != weight.removesuffix("weight") + "bias":
            return False
        own = weight.removesuffix("weight")
        return self._write(node, Op(LINEAR, [x], weight=f"{own}packed", bias=f"{own}bias" if bias else None))

    def _linear_before(self, node: Any) -> Op | None:
        """The linear step that alone makes a value which one operation reads, without an activation or a factor yet."""
        value = self._value(node)
        step = self.steps[value - 1] if value and len(node.users) == 1 else None
        plain = step is not None and step.kind == LINEAR and not step.activation and step.weight not in self.folds
        return step if plain else None

    def _scaled(self, node: Node, has: dict[str, Any]) -> bool:
        """A linear layer's output times a number, before heads are made of it, or times a parameter."""
        for before, by in ((has["self"], has["other"]), (has["other"], has["self"])):
            step = self._linear_before(before)
            if step is None:
                continue
            if isinstance(by, int | float):
                self.factors[node] = self.values[before], float(by)
                return True
            scale = self._part(by, before.meta["val"].shape[-1])
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
        parts = [has.get("weight"), has.get("bias")]
        paths = [None if part is None else self._part(part, rows) for part in parts]
        if any(path is None for part, path in zip(parts, paths, strict=True) if part is not None):
            return False
        norm = Op(NORM, [value, NONE], scale=paths[0], shift=paths[1], number=epsilon_of(node))
        norm.norm = NORM_NAMES.index(NORMS[node.target])
        before = self.steps[value - 1] if value else None
        if (
            value == len(self.steps)
            and before
            and before.kind == NORM
            and not before.norm
            and len(has["input"].users) == 1
        ):
            norm.reads = before.reads
            self.steps.pop()
        return self._write(node, norm)

    def _same(self, node: Node, has: dict[str, Any]) -> bool:
        """What changes nothing: a copy, a cast to the same type, dropout outside of training."""
        before = node.all_input_nodes[0]
        if has.get("train") or node.meta["val"].dtype != before.meta["val"].dtype:
            return False
        return self._alike(node, before)

    def _alike(self, node: Node, before: Node) -> bool:
        every: list[dict[Node, Any]] = [self.values, self.factors, self.split]
        for known in every:
            if before in known:
                known[node] = known[before]
                return True
        return False

    def _shaped(self, node: Node, has: dict[str, Any]) -> bool:
        before = node.all_input_nodes[0]
        old, new = tuple(before.meta["val"].shape), tuple(node.meta["val"].shape)
        if old == new:
            return self._alike(node, before)
        value, factor = self.factors.get(before, (self._value(before), 1.0))
        if value is not None and len(new) == 4 and old[:2] == new[:2]:
            self.split[node] = HeadSplit(value, new[2], new[3], factor)
            return True
        heads = self.split.get(before)
        if heads is None or heads.turned or heads.factor != 1 or new != (*old[:2], old[2] * old[3]):
            return False
        self.values[node] = heads.value
        return True

    def _turned(self, node: Node, has: dict[str, Any]) -> bool:
        heads = self.split.get(node.all_input_nodes[0])
        order = sorted(axis % 4 for axis in (has["dim0"], has["dim1"])) if "dim0" in has else None
        turns = order == [1, 2] or [axis % 4 for axis in has.get("dims") or ()] == [0, 2, 1, 3]
        if heads is None or not turns:
            return False
        self.split[node] = replace(heads, turned=not heads.turned)
        return True

    def _attention(self, node: Node, has: dict[str, Any]) -> bool:
        q, k, v = (self.split.get(has[name]) for name in ("query", "key", "value"))
        if q is None or k is None or v is None or not (q.turned and k.turned and v.turned):
            return False
        if (
            has["dropout_p"]
            or (has["is_causal"] and not self.causal)
            or q.width != k.width
            or (k.heads, k.width) != (v.heads, v.width)
        ):
            return False
        if (
            v.factor != 1
            or q.heads % k.heads
            or self.heads not in (0, q.heads)
            or (has["attn_mask"] is None) != (self.mask is None)
        ):
            return False
        self.heads = q.heads
        scale = (q.width**-0.5 if has["scale"] is None else float(has["scale"])) * q.factor * k.factor
        heads = (q.heads, k.heads, q.width)
        self.steps.append(Op(ATTENTION, [q.value, k.value, v.value], number=scale, heads=heads))
        self.split[node] = HeadSplit(len(self.steps), q.heads, q.width, 1.0, True)
        return True

    def _exit(self) -> Node:
        inside = {*self.nodes}
        exits = [n for n in self.nodes if any(u not in inside and u.target not in CHECKS for u in n.users)]
        if len(exits) != 1 or self.values.get(exits[0]) != len(self.steps) or not is_stream(exits[0]):
            raise NoChainError("gives more than the stream" if len(exits) > 1 else "does not end in a stream")
        return exits[0]

    def _form(self, module: nn.Module) -> BlockSignature:
        call = self.traced.calls.get(self.path)
        if call is None or call.times > 1:
            raise NoChainError("is called more than once" if call else "is called in a way that cannot be told")
        tensors = {name: value for name, value in call.given.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in call.given.items() if name not in tensors}
        refuse_strange(rest)
        masks = [name for name, value in tensors.items() if any(value is mask for mask in self.traced.masks)]
        if (self.mask is None) != (not masks) or len(masks) > 1:
            raise NoChainError("makes its mask of attention itself")
        like = self.source.meta["val"]
        streams = [n for n, v in tensors.items() if n not in masks and v.shape == like.shape and v.dtype == like.dtype]
        if len(streams) != 1:
            raise NoChainError(f"is called with {len(streams)} tensors that may be its stream")
        others = tuple(name for name in tensors if name not in (*masks, *streams))
        mask = masks[0] if masks else ""
        return BlockSignature(positional(module), streams[0], mask, others, rest, given_by(call.output))


def refuse_strange(constants: Mapping[str, Any]) -> None:
    """NoChainError for arguments that are no plain constants."""
    for name, value in constants.items():
        if value is not None and not isinstance(value, CONSTANTS):
            raise NoChainError(f"is called with {name}, a {type(value).__name__}")


def given_by(output: Any) -> int:
    """See BlockSignature."""
    if isinstance(output, torch.Tensor):
        return 0
    plain = type(output) is tuple and output and isinstance(output[0], torch.Tensor)
    if not plain or any(other is not None for other in output[1:]):
        raise NoChainError(f"returns a {type(output).__name__} of more than its stream")
    return len(output)


def _attends(node: Node) -> bool:
    return node.target is aten.scaled_dot_product_attention.default


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
    aten.transpose.int: ChainReader._turned,
    aten.permute.default: ChainReader._turned,
    aten.scaled_dot_product_attention.default: ChainReader._attention,
    **dict.fromkeys(COPIES, ChainReader._same),
    **dict.fromkeys(_SHAPED, ChainReader._shaped),
}
