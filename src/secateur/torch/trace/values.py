"""What a rule sees and makes: the value of a graph node over axis atoms, and the call of one operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.torch.trace.atoms import Dim, Factor, expand, fresh, mark, unify

UNKNOWN_EXTENT = 7919
"""Stands for an extent that depends on data (the number of non-zeros, ...)."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    key: tells values apart; operations that only rename or cast keep it. data: depends on an input of the model.
    tag: `score` after a product of two activations, `prob` after the softmax of one.
    weight, order: the parameter this is a rearrangement of, and the stored dimension behind each of its dimensions.
    looked_up: rows of the weight were gathered by an index that data decides (experts).
    dtype: `float`, `int` or `bool`. domain: the dimension that its numbers are positions of (indices of a top-k).
    over: the dimension that a score was summed over.
    numbers: the entries of a small constant of integers. past: bit set of the values it was computed from.
    behind: those of them with a product in between.
    """

    dims: tuple[Dim, ...]
    key: int = -1
    data: bool = False
    tag: str = ""
    weight: str | None = None
    order: tuple[int, ...] | None = None
    looked_up: bool = False
    dtype: str = "float"
    domain: Dim | None = None
    over: Dim | None = None
    numbers: tuple[int, ...] | None = None
    past: int = 0
    behind: int = 0

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


@dataclass
class Contraction:
    """A product as it was seen; named once the graph is done.

    weight: the parameter, or None. reads: key of the activation. in_dim: the stored dimension summed over.
    dims: every dimension of the product. routed: rows of the weight are chosen by data.
    """

    weight: str | None
    reads: int
    in_dim: int | None
    dims: list[Dim]
    routed: bool = False


@dataclass
class Record:
    """What the walk over the graph gathers beside the values."""

    contractions: list[Contraction] = field(default_factory=list)
    heads: list[tuple[Dim, Dim]] = field(default_factory=list)
    """For each softmax attention: the head dimension of the probabilities and that of the values."""
    mixers: list[Dim] = field(default_factory=list)
    """Dimensions that two activations share in a product without a softmax (linear attention, state spaces)."""
    residual: list[Dim] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    """Operations without a rule -> how often they were met."""


@dataclass
class OpCall:
    """One operation: its arguments by the names of its schema, with values in place of nodes.

    constants: numbers that the modules around it store as attributes; any other number was computed in the forward
    pass, perhaps from the size of an axis.
    """

    name: str
    args: dict[str, Any]
    shapes: list[tuple[int, ...] | None]
    record: Record
    constants: frozenset[float] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        assert self.shapes[0] is not None
        return self.shapes[0]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default when absent or None."""
        value = self.args.get(name)
        return default if value is None else value

    def value(self, name: str) -> Value:
        """An argument that must be a tensor."""
        value = self.args[name]
        assert isinstance(value, Value), f"{self.name}: {name} is no tensor"
        return value

    def axis(self, name: str = "dim", rank: int | None = None, default: int = 0) -> int:
        """An argument that names a dimension, made non-negative."""
        rank = rank if rank is not None else self.value("self").rank
        return int(self.get(name, default)) % max(rank, 1)

    def axes(self, name: str = "dim", rank: int | None = None) -> list[int]:
        """An argument that names several dimensions; all of them when it is absent or empty."""
        rank = rank if rank is not None else self.value("self").rank
        value = self.get(name, [])
        value = [value] if isinstance(value, int) else list(value)
        return [int(d) % max(rank, 1) for d in value] or list(range(rank))

    def tensors(self) -> list[Value]:
        """Every tensor among the arguments, lists opened."""
        found: list[Value] = []
        for value in self.args.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Value):
                    found.append(item)
        return found

    def new(self, dims: Sequence[Dim], **more: Any) -> Value:
        """A value that this call makes; `data` follows its arguments."""
        more.setdefault("data", any(t.data for t in self.tensors()))
        return Value(tuple(dims), **more)

    def frozen_dims(self, reason: str, index: int = 0) -> list[Dim]:
        """Fresh frozen dimensions of the shape of a result."""
        return [fresh(s, reason) for s in self.shapes[index] or ()]

    def freeze_all(self, reason: str) -> None:
        """Freeze every axis of every argument."""
        for value in self.tensors():
            for dim in value.dims:
                mark(dim, reason)


Rule = Callable[[OpCall], "Value | list[Value]"]


def remap(dim: Dim, zero: bool | None = None, const: bool | None = None) -> Dim:
    """The same axes with what is known of the tensor replaced."""
    return tuple(
        Factor(f.atom, f.zero if zero is None else zero, f.const if const is None else const) for f in expand(dim)
    )


def broadcast(
    call: OpCall, values: Sequence[Value], zero: Callable[[list[bool]], bool], shape: Sequence[int] | None = None
) -> list[Dim]:
    """Unite the dimensions of operands as broadcasting does.

    `zero` says, given which operands are zero at a masked unit, whether the result is. An operand that does not have
    the axis is not.
    """
    shape = call.shape if shape is None else shape
    result: list[Dim] = []
    for i in range(len(shape)):
        present: list[tuple[int, Dim]] = []
        for k, value in enumerate(values):
            at = i - (len(shape) - value.rank)
            if at >= 0 and expand(value.dims[at]):
                present.append((k, value.dims[at]))
        result.append(_merge(present, len(values), zero))
    return result


def _merge(present: list[tuple[int, Dim]], count: int, zero: Callable[[list[bool]], bool]) -> Dim:
    if not present:
        return ()
    whole = True
    for _, dim in present[1:]:
        whole &= unify(present[0][1], dim)
    opened = {k: expand(dim) for k, dim in present}
    base = opened[present[0][0]]
    if not whole:
        return remap(tuple(base), zero=False, const=False)
    merged = []
    for i, factor in enumerate(base):
        flags = [k in opened and opened[k][i].zero for k in range(count)]
        merged.append(Factor(factor.atom, zero(flags), all(o[i].const for o in opened.values())))
    return tuple(merged)


def words(text: str) -> tuple[str, ...]:
    """Names of operations, written as a sentence."""
    return tuple(text.split())


def same(value: Value, **changes: Any) -> Value:
    """A copy of a value with fields changed."""
    return replace(value, **changes)
