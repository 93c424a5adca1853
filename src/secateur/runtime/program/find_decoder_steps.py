"""Finds blocks of a traced decoder that can take a token at a time: layers, gates, norms, rotary positions and
attention over a cache, from one stream to one stream. It goes by the graph, never by what classes are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from secateur.kernels.packing import NORMS
from secateur.kernels.steps import GATE, NONE, NORM, ROTARY, Op
from secateur.runtime.layers.fused import PrimitiveNorm
from secateur.runtime.program.find_chains import ChainReader, HeadSplit, NoChainError, blocks, given_by
from secateur.runtime.program.find_fusions import origin
from secateur.runtime.program.from_fx import CHECKS, COPIES, Traced, aten, positional, stack

CACHE, MASK = "past_key_values", "attention_mask"
"""The arguments of transformers' blocks that hold keys and values of earlier tokens, and a mask, which may be None."""
IGNORED = {"use_cache", "position_ids", "cache_position"}
"""Arguments that make no difference beside those that are looked at."""
PLACE = "layer_idx"
"""Where transformers' attention keeps its number in the cache."""


@dataclass(frozen=True)
class DecoderForm:
    """How a block is called, and what it gives: `names` are the arguments by position, `x` the one that is the stream,
    `mask` that of attention and `turns` the pair of cosines and sines of positions ('' for none). `given` is the length
    of the tuple that it returns, with the stream first and nothing after it, or 0 for the stream itself.
    """

    names: tuple[str, ...]
    x: str
    mask: str
    turns: str
    given: int


@dataclass(frozen=True)
class DecoderBlock:
    """A block that can take a token at a time. `steps` read value 0 and give the last; weights and the like are paths
    in the model, `attention` that of the module that knows its place in the cache, `width` the numbers of a token.
    """

    path: str
    form: DecoderForm
    steps: list[Op]
    attention: str
    width: int


def decoder_blocks(traced: Traced, norms: Mapping[str, PrimitiveNorm]) -> tuple[list[DecoderBlock], dict[str, str]]:
    """The blocks that can take a token at a time, in the order of the model, and why others that are called with a
    cache cannot; `norms` are modules that are written out norms.
    """
    found, refused = blocks(traced, lambda traced, path, nodes: _DecoderReader(traced, path, nodes, norms))
    calls = {path: traced.calls.get(path) for path in refused}
    return found, {path: why for path, why in refused.items() if (call := calls[path]) and CACHE in call.given}


@dataclass(frozen=True)
class _Norm:
    """A norm that is written out, and what it reads; `between` are its operations but for the last."""

    x: Node
    scale: str | None
    epsilon: float
    between: tuple[Node, ...]


@dataclass(frozen=True)
class _Rotary:
    """x cos + turned(x) sin, which ends in a sum; `between` are its operations but for the last."""

    x: Node
    cos: Node
    sin: Node
    between: tuple[Node, ...]


class _DecoderReader(ChainReader):
    """Goes through the operations of a block of a decoder. `repeated` are heads of which each is there several times,
    on the way there."""

    causal = True

    def __init__(self, traced: Traced, path: str, nodes: list[Node], norms: Mapping[str, PrimitiveNorm]):
        self.norms = dict(_norm(module, norm, nodes) for module, norm in norms.items() if module.startswith(f"{path}."))
        self.rotaries = {node: found for node in nodes if (found := _rotary(node)) is not None}
        composites: list[_Norm | _Rotary] = [*self.norms.values(), *self.rotaries.values()]
        self.skipped = {node for composite in composites for node in composite.between}
        self.turns: set[Node] = set()
        for rotary in self.rotaries.values():
            for turn in (rotary.cos, rotary.sin):
                way = list(_way(turn, {*nodes}))
                self.skipped |= {*way[:-1]}
                self.turns.add(way[-1])
        self.repeated: dict[Node, HeadSplit] = {}
        self.attention = ""
        super().__init__(traced, path, nodes)

    def _from_outside(self) -> tuple[set[Node], set[Node]]:
        masks, others = super()._from_outside()
        return masks, others - self.turns

    def block(self, module: nn.Module) -> Any:
        """What the block is.

        Raises:
            NoChainError: when it cannot take a token at a time.
        """
        if not all(self.traced.is_free(each) for each in self.traced.within(self.path)):
            raise NoChainError("has hooks, or stands in more than one place")
        for node in self.nodes:
            if node not in self.skipped:
                self._read(node)
        self._exit()
        if self.folds:
            raise NoChainError("multiplies outputs of its layers by a parameter")
        attention = self.traced.modules.get(self.attention)
        if not isinstance(getattr(attention, PLACE, None), int) or not getattr(attention, "is_causal", False):
            raise NoChainError("has no attention to earlier tokens alone that knows its place in a cache")
        form, width = self._decoder_form(module), self.source.meta["val"].shape[-1]
        return DecoderBlock(self.path, form, self.steps, self.attention, width)

    def _read(self, node: Node) -> None:
        if node in self.norms:
            done = self._written_norm(node)
        elif node in self.rotaries:
            done = self._turn(node)
        else:
            return super()._read(node)
        if not done:
            raise NoChainError(f"computes a norm or rotary positions of another kind in {stack(node)[-1]}")

    def _written_norm(self, node: Node) -> bool:
        norm = self.norms[node]
        step = Op(NORM, [NONE, NONE], scale=norm.scale, number=norm.epsilon, norm=NORMS.index("rms_norm"))
        heads = self.split.get(norm.x)
        if heads is None:
            value = self._value(norm.x)
            step.reads = [NONE if value is None else value, NONE]
            return value is not None and self._write(node, step)
        # HeadSplit one by one.
        if heads.factor != 1:
            return False
        step.reads, step.heads = [heads.value, NONE], (heads.heads, heads.heads, heads.width)
        self.steps.append(step)
        self.split[node] = HeadSplit(len(self.steps), heads.heads, heads.width, 1.0, heads.turned)
        return True

    def _turn(self, node: Node) -> bool:
        heads = self.split.get(self.rotaries[node].x)
        if heads is None or not heads.turned or heads.factor != 1:
            return False
        self.steps.append(Op(ROTARY, [heads.value], heads=(heads.heads, heads.heads, heads.width)))
        self.split[node] = HeadSplit(len(self.steps), heads.heads, heads.width, 1.0, True)
        return True

    def _scaled(self, node: Node, has: dict[str, Any]) -> bool:
        """A number times a layer, or a gate: the product of two values, of which a linear layer alone makes one."""
        for gate, other in ((has["self"], has["other"]), (has["other"], has["self"])):
            a, b = self._value(gate), self._value(other)
            if a and b and a != b and self._linear_before(other) is not None:
                return self._write(node, Op(GATE, [a, b]))
        return super()._scaled(node, has)

    def _repeat(self, node: Node, has: dict[str, Any]) -> bool:
        """HeadSplit of keys and values on the way to be as many as those of queries."""
        before, shape = node.all_input_nodes[0], node.meta["val"].shape
        heads = self.repeated.get(before) or self.split.get(before)
        if heads is None or not heads.turned or len(shape) != 5 or tuple(shape[1:2]) != (heads.heads,):
            return False
        self.repeated[node] = heads
        return True

    def _shaped(self, node: Node, has: dict[str, Any]) -> bool:
        before, new = node.all_input_nodes[0], tuple(node.meta["val"].shape)
        if before in self.repeated:
            heads, old = self.repeated[before], tuple(before.meta["val"].shape)
            self.split[node] = heads
            return new == (old[0], old[1] * old[2], *old[3:])
        return super()._shaped(node, has)

    def _attention(self, node: Node, has: dict[str, Any]) -> bool:
        self.attention = stack(node)[-1] if not self.attention else ""
        return super()._attention(node, has)

    def _decoder_form(self, module: nn.Module) -> DecoderForm:
        call = self.traced.calls.get(self.path)
        if call is None or call.times > 1:
            raise NoChainError("is called more than once" if call else "is called in a way that cannot be told")
        given = {name: value for name, value in call.given.items() if name not in {*IGNORED, CACHE}}
        if CACHE not in call.given:
            raise NoChainError("takes no cache")
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        masks = [name for name, value in tensors.items() if any(value is mask for mask in self.traced.masks)]
        pairs = [name for name, value in given.items() if _is_pair(value)]
        if len(masks) > 1 or (self.mask is not None and not masks) or not bool(self.turns) <= len(pairs) <= 1:
            raise NoChainError("makes its mask of attention or its positions itself")
        streams = [name for name in tensors if name not in masks]
        rest = [name for name in given if name not in (*streams, *masks, *pairs) and given[name] not in (None, False)]
        if len(streams) != 1 or rest:
            raise NoChainError(f"is called with {', '.join(rest or streams)}")
        mask = masks[0] if masks else MASK if MASK in call.given else ""
        turns = pairs[0] if pairs else ""
        return DecoderForm(positional(module), streams[0], mask, turns, given_by(call.output))


_DecoderReader.readers = {
    **ChainReader.readers,
    aten.mul.Tensor: _DecoderReader._scaled,
    aten.view.default: _DecoderReader._shaped,
    aten.reshape.default: _DecoderReader._shaped,
    aten.unsqueeze.default: _DecoderReader._repeat,
    aten.expand.default: _DecoderReader._repeat,
    aten.scaled_dot_product_attention.default: _DecoderReader._attention,
}


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, torch.Tensor) for each in value)


def _rotary(add: Node) -> _Rotary | None:
    """Rotary positions that end in a sum, or None."""
    if add.target is not aten.add.Tensor or len(add.all_input_nodes) != 2:
        return None
    products = add.all_input_nodes
    if any(product.target is not aten.mul.Tensor for product in products):
        return None
    for plain, other in (products, products[::-1]):
        for whole, sin in _orders(other):
            found = _turned(whole)
            if found is None:
                continue
            x, between = found
            for same, cos in _orders(plain):
                if same is x and _is_turn(cos, x) and _is_turn(sin, x):
                    return _Rotary(x, cos, sin, (plain, other, whole, *between))
    return None


def _orders(product: Node) -> Iterator[tuple[Any, Any]]:
    yield product.args[0], product.args[1]
    yield product.args[1], product.args[0]


def _turned(whole: Any) -> tuple[Node, tuple[Node, ...]] | None:
    """What (-second half, first half) was made of, along the last dimension, and the operations in between."""
    if not isinstance(whole, Node) or whole.target is not aten.cat.default or whole.args[1:] not in ((-1,), (3,)):
        return None
    parts: Any = whole.args[0]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    second, first = parts[0].args[0], parts[1]
    if any(part.target is not aten.slice.Tensor or part.args[1] not in (-1, 3) for part in (second, first)):
        return None
    x = first.args[0]
    shape = x.meta["val"].shape
    half = shape[-1] // 2
    bounds = [tuple(part.args[2:4]) for part in (first, second)]
    if second.args[0] is not x or len(shape) != 4 or shape[-1] % 2 or bounds[0] != (0, half):
        return None
    if bounds[1][0] != half or bounds[1][1] < shape[-1]:
        return None
    return x, (parts[0], second, first)


def _is_turn(turn: Any, x: Node) -> bool:
    """Whether a node is (batch or 1, 1, tokens, width) for heads (batch, heads, tokens, width)."""
    if not isinstance(turn, Node):
        return False
    shape, of = turn.meta["val"].shape, x.meta["val"].shape
    return len(shape) == 4 and shape[0] in (1, of[0]) and tuple(shape[1:]) == (1, *of[2:])


def _way(turn: Node, inside: set[Node]) -> Iterator[Node]:
    """A cosine or sine, and what it was in a block before it got a dimension for the heads, back to its source."""
    yield turn
    while turn in inside and (turn.target is aten.unsqueeze.default or turn.target in COPIES):
        turn = turn.all_input_nodes[0]
        yield turn


def _norm(path: str, norm: PrimitiveNorm, nodes: list[Node]) -> tuple[Node, _Norm]:
    """The last operation of a module that is a norm, and the rest of it."""
    inside = [node for node in nodes if stack(node)[-1] == path and node.target not in CHECKS]
    own = [node for node in inside if origin(node) in inside and node.target not in COPIES]
    *between, end = [node for node in inside if origin(node) in own]
    return end, _Norm(origin(own[0].args[0]), f"{path}.{norm.scale}" if norm.scale else None, norm.epsilon, (*between,))
