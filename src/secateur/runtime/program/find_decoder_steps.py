"""Finds blocks of a traced decoder that can compute one token at a time: layers, gates, norms, rotary positions and
attention over a cache, from one stream to one stream. It reads the graph, never the classes of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from secateur.kernels.format import GATE, NORM, RMS_NORM, ROTARY
from secateur.kernels.steps import NONE, Op
from secateur.runtime.layers.fused import PrimitiveNorm
from secateur.runtime.program.find_chains import ChainReader, HeadSplit, NoChainError, find_blocks, output_length
from secateur.runtime.program.from_fx import CHECKS, COPIES, Traced, aten, origin, positional, stack

CACHE, MASK = "past_key_values", "attention_mask"
"""The arguments of transformers' blocks that are the keys and values of earlier tokens, and a mask (or None)."""
IGNORED = {"use_cache", "position_ids", "cache_position"}
"""Arguments that change nothing beyond what the other arguments say."""
LAYER_INDEX = "layer_idx"
"""The attribute of transformers' attention that is its number in the cache."""


@dataclass(frozen=True)
class DecoderSignature:
    """How a block is called, and what it returns. Field names are keys of runtime.json in saved folders.

    - `names`: the parameters that may be passed by position
    - `x`: the parameter that is the stream
    - `mask`: the parameter that is the mask of attention; '' for none
    - `turns`: the parameter that is the pair of cosines and sines of rotary positions; '' for none
    - `given`: the length of the tuple that the block returns (the stream, then None); 0 where it returns the stream
    """

    names: tuple[str, ...]
    x: str
    mask: str
    turns: str
    given: int


@dataclass(frozen=True)
class DecoderBlock:
    """A block that can compute one token at a time.

    - `path`: its path in the model
    - `signature`: how it is called
    - `steps`: its steps, from value 0, the stream, to the last, its output; weights and vectors are paths in the model
    - `attention`: the path of the module that has the `LAYER_INDEX`
    - `width`: the numbers of a token
    """

    path: str
    signature: DecoderSignature
    steps: list[Op]
    attention: str
    width: int


def decoder_blocks(traced: Traced, norms: Mapping[str, PrimitiveNorm]) -> tuple[list[DecoderBlock], dict[str, str]]:
    """The blocks that can compute one token at a time, in the order of the model, and why others that are called with a
    cache cannot; `norms` are the modules that are norms in single operations, by path.
    """
    blocks, refused = find_blocks(traced, lambda traced, path, nodes: _DecoderReader(traced, path, nodes, norms))
    calls = {path: traced.calls.get(path) for path in refused}
    return blocks, {path: why for path, why in refused.items() if (call := calls[path]) and CACHE in call.inputs}


@dataclass(frozen=True)
class _Norm:
    """A norm in single operations.

    - `x`: the node that is normalised
    - `scale`: the path of its parameter, or None
    - `epsilon`: what it adds to the mean of the squares
    - `between`: its operations but for the last
    """

    x: Node
    scale: str | None
    epsilon: float
    between: tuple[Node, ...]


@dataclass(frozen=True)
class _Rotary:
    """Rotary positions: x cos + rotate_half(x) sin, which ends in a sum.

    - `x`: the heads (batch, heads, tokens, width)
    - `cos`, `sin`: cosines and sines
    - `between`: the operations but for the last
    """

    x: Node
    cos: Node
    sin: Node
    between: tuple[Node, ...]


class _DecoderReader(ChainReader):
    """Reads the operations of a decoder's block.

    - `norms`, `rotaries`: the last operation of each norm and each rotary position -> what ends there
    - `skipped`: operations inside these, which are not read one by one
    - `angles`: nodes outside of the block that are cosines and sines of positions
    - `repeated`: nodes between key or value heads and the same heads repeated for each query head
    - `attention`: the path of the module that attends
    """

    causal = True

    def __init__(self, traced: Traced, path: str, nodes: list[Node], norms: Mapping[str, PrimitiveNorm]):
        self.norms = dict(_norm(module, norm, nodes) for module, norm in norms.items() if module.startswith(f"{path}."))
        self.rotaries = {node: rotary for node in nodes if (rotary := _rotary(node)) is not None}
        composites: list[_Norm | _Rotary] = [*self.norms.values(), *self.rotaries.values()]
        self.skipped = {node for composite in composites for node in composite.between}
        self.angles: set[Node] = set()
        for rotary in self.rotaries.values():
            for angle in (rotary.cos, rotary.sin):
                way = list(_way_to_source(angle, {*nodes}))
                self.skipped |= {*way[:-1]}
                self.angles.add(way[-1])
        self.repeated: dict[Node, HeadSplit] = {}
        self.attention = ""
        super().__init__(traced, path, nodes)

    def _from_outside(self) -> tuple[set[Node], set[Node]]:
        masks, others = super()._from_outside()
        return masks, others - self.angles

    def block(self, module: nn.Module) -> Any:
        """Read the block.

        Raises:
            NoChainError: when it cannot compute one token at a time.
        """
        self._read_all([node for node in self.nodes if node not in self.skipped])
        self._exit()
        if self.folds:
            raise NoChainError("multiplies outputs of its layers by a parameter")
        attention = self.traced.modules.get(self.attention)
        if not isinstance(getattr(attention, LAYER_INDEX, None), int) or not getattr(attention, "is_causal", False):
            raise NoChainError("has no attention to earlier tokens alone that knows its place in a cache")
        width = self.source.meta["val"].shape[-1]
        return DecoderBlock(self.path, self._decoder_signature(module), self.steps, self.attention, width)

    def _read(self, node: Node) -> None:
        if node in self.norms:
            is_known = self._primitive_norm(node)
        elif node in self.rotaries:
            is_known = self._rotate(node)
        else:
            return super()._read(node)
        if not is_known:
            raise NoChainError(f"computes a norm or rotary positions of another kind in {stack(node)[-1]}")

    def _primitive_norm(self, node: Node) -> bool:
        """A norm of a value, or of each of its heads."""
        norm = self.norms[node]
        step = Op(NORM, [NONE, NONE], scale=norm.scale, number=norm.epsilon, norm=RMS_NORM)
        heads = self.split.get(norm.x)
        if heads is None:
            value = self._value(norm.x)
            step.reads = [NONE if value is None else value, NONE]
            return value is not None and self._write(node, step)
        if heads.factor != 1:
            return False
        step.reads, step.heads = [heads.value, NONE], (heads.heads, heads.heads, heads.width)
        return self._write_heads(node, step, transposed=heads.transposed)

    def _rotate(self, node: Node) -> bool:
        heads = self.split.get(self.rotaries[node].x)
        if heads is None or not heads.transposed or heads.factor != 1:
            return False
        step = Op(ROTARY, [heads.value], heads=(heads.heads, heads.heads, heads.width))
        return self._write_heads(node, step, transposed=True)

    def _scaled(self, node: Node, has: dict[str, Any]) -> bool:
        """A number times a layer, or a gate: the product of two values, of which a linear layer computes one."""
        for gate, other in ((has["self"], has["other"]), (has["other"], has["self"])):
            a, b = self._value(gate), self._value(other)
            if a and b and a != b and self._linear_before(other) is not None:
                return self._write(node, Op(GATE, [a, b]))
        return super()._scaled(node, has)

    def _repeat(self, node: Node, has: dict[str, Any]) -> bool:
        """Heads of keys or values (batch, heads, times, tokens, width), before they are as many as those of queries."""
        before, shape = node.all_input_nodes[0], node.meta["val"].shape
        heads = self.repeated.get(before) or self.split.get(before)
        if heads is None or not heads.transposed or len(shape) != 5 or tuple(shape[1:2]) != (heads.heads,):
            return False
        self.repeated[node] = heads
        return True

    def _reshaped(self, node: Node, has: dict[str, Any]) -> bool:
        before, new = node.all_input_nodes[0], tuple(node.meta["val"].shape)
        if before in self.repeated:
            heads, old = self.repeated[before], tuple(before.meta["val"].shape)
            self.split[node] = heads
            return new == (old[0], old[1] * old[2], *old[3:])
        return super()._reshaped(node, has)

    def _attention(self, node: Node, has: dict[str, Any]) -> bool:
        self.attention = stack(node)[-1] if not self.attention else ""
        return super()._attention(node, has)

    def _decoder_signature(self, module: nn.Module) -> DecoderSignature:
        call = self._call()
        if CACHE not in call.inputs:
            raise NoChainError("takes no cache")
        inputs = {name: value for name, value in call.inputs.items() if name not in {*IGNORED, CACHE}}
        masks = self._masks(inputs)
        tensors, pairs = _names(inputs, _is_tensor), _names(inputs, _is_pair)
        if len(masks) > 1 or (self.mask is not None and not masks) or not bool(self.angles) <= len(pairs) <= 1:
            raise NoChainError("makes its mask of attention or its positions itself")
        streams = [name for name in tensors if name not in masks]
        known = (*tensors, *pairs)
        unknown = [name for name, value in inputs.items() if name not in known and value not in (None, False)]
        if len(streams) != 1 or unknown:
            raise NoChainError(f"is called with {', '.join(unknown or streams)}")
        mask, pair = next(iter(masks), MASK if MASK in call.inputs else ""), next(iter(pairs), "")
        return DecoderSignature(positional(module), streams[0], mask, pair, output_length(call.output))


_DecoderReader.readers = {
    **ChainReader.readers,
    aten.mul.Tensor: _DecoderReader._scaled,
    aten.view.default: _DecoderReader._reshaped,
    aten.reshape.default: _DecoderReader._reshaped,
    aten.unsqueeze.default: _DecoderReader._repeat,
    aten.expand.default: _DecoderReader._repeat,
    aten.scaled_dot_product_attention.default: _DecoderReader._attention,
}


def _names(inputs: Mapping[str, Any], has_kind: Callable[[Any], bool]) -> list[str]:
    return [name for name, value in inputs.items() if has_kind(value)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_tensor, value))


def _rotary(add: Node) -> _Rotary | None:
    """The rotary positions that end in a sum, or None."""
    if add.target is not aten.add.Tensor or len(add.all_input_nodes) != 2:
        return None
    products = add.all_input_nodes
    if any(product.target is not aten.mul.Tensor for product in products):
        return None
    for plain, rotated in (products, products[::-1]):
        for half, sin in _orders(rotated):
            x, between = _rotated_half(half)
            if x is None:
                continue
            for same, cos in _orders(plain):
                if same is x and _is_angle(cos, x) and _is_angle(sin, x):
                    return _Rotary(x, cos, sin, (plain, rotated, half, *between))
    return None


def _orders(product: Node) -> Iterator[tuple[Any, Any]]:
    yield product.args[0], product.args[1]
    yield product.args[1], product.args[0]


def _rotated_half(half: Any) -> tuple[Node | None, tuple[Node, ...]]:
    """The node x (batch, heads, tokens, width) of which a node is (-second half, first half) along the last dimension,
    and the operations in between; None where the node is something else."""
    if not isinstance(half, Node) or half.target is not aten.cat.default or half.args[1:] not in ((-1,), (3,)):
        return None, ()
    parts: Any = half.args[0]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None, ()
    second, first = parts[0].args[0], parts[1]
    if any(part.target is not aten.slice.Tensor or part.args[1] not in (-1, 3) for part in (second, first)):
        return None, ()
    x = first.args[0]
    shape = x.meta["val"].shape
    if second.args[0] is not x or len(shape) != 4 or shape[-1] % 2:
        return None, ()
    middle = shape[-1] // 2
    bounds = [tuple(part.args[2:4]) for part in (first, second)]
    if bounds[0] != (0, middle) or bounds[1][0] != middle or bounds[1][1] < shape[-1]:
        return None, ()
    return x, (parts[0], second, first)


def _is_angle(node: Any, x: Node) -> bool:
    """Whether a node is (batch or 1, 1, tokens, width) for heads x (batch, heads, tokens, width)."""
    if not isinstance(node, Node):
        return False
    shape, heads = node.meta["val"].shape, x.meta["val"].shape
    return len(shape) == 4 and shape[0] in (1, heads[0]) and tuple(shape[1:]) == (1, *heads[2:])


def _way_to_source(angle: Node, inside: set[Node]) -> Iterator[Node]:
    """A cosine or sine, and the nodes before it in the block, until before it got a dimension for the heads."""
    yield angle
    while angle in inside and (angle.target is aten.unsqueeze.default or angle.target in COPIES):
        angle = angle.all_input_nodes[0]
        yield angle


def _norm(path: str, norm: PrimitiveNorm, nodes: list[Node]) -> tuple[Node, _Norm]:
    """The last operation of a module that is a norm, and the norm."""
    inside = [node for node in nodes if stack(node)[-1] == path and node.target not in CHECKS]
    own = [node for node in inside if origin(node) in inside and node.target not in COPIES]
    *between, end = [node for node in inside if origin(node) in own]
    return end, _Norm(origin(own[0].args[0]), f"{path}.{norm.scale}" if norm.scale else None, norm.epsilon, (*between,))
