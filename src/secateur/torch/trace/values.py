"""What a rule reads and makes: the value of a graph node over axis atoms, and the call of one operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.torch.trace.atoms import Dim, Factor, expand, fresh, mark, unite

UNKNOWN_EXTENT = 7919
"""Stands for an extent that depends on data (the number of non-zeros, ...)."""


class NotCovered(Exception):
    """A rule does not cover the arguments of a call: the axes that the call touches freeze.

    Any other exception in a rule is a defect of the rule.
    """


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    dims: its dimensions over axis atoms.
    key: identifies the value; operations that only rename or cast a tensor keep its key.
    data: whether it depends on an input of the model.
    tag: `input` for an input of the model, `score` after a product of two activations, `prob` after the softmax of
        one, `sum` after a sum.
    weight: the parameter that this tensor is a rearrangement of.
    order: for each dimension, the stored dimension of the weight behind it.
    looked_up: rows of the weight were gathered by an index that data decides (experts).
    dtype: `float`, `int` or `bool`.
    domain: the dimension that its numbers are positions of (indices of a top-k).
    over: the dimension that a score or sum was summed over.
    numbers: the entries of a small constant of integers.
    past: bit set of the keys of the values it was computed from.
    behind: the keys in `past` with a product in between.
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


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors; its dimensions get names once the whole graph was read.

    weight: the parameter, or None for a product of two activations.
    reads: key of the activation that a weight is multiplied by.
    in_dim: the stored dimension of the weight that is summed over.
    dims: every dimension of the product.
    """

    weight: str | None
    reads: int
    in_dim: int | None
    dims: list[Dim]


@dataclass
class Record:
    """What the rules note beside the values.

    contractions: the products, in order.
    heads: for each softmax attention, the head dimension of the probabilities and that of the values.
    mixers: dimensions that two activations share in a product without a softmax (linear attention, state spaces).
    residual: dimensions of the residual stream.
    unknown: why an operation froze what it touches (no rule, ...) -> how often.
    """

    contractions: list[Contraction] = field(default_factory=list)
    heads: list[tuple[Dim, Dim]] = field(default_factory=list)
    mixers: list[Dim] = field(default_factory=list)
    residual: list[Dim] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)


@dataclass
class OpCall:
    """One operation.

    name: without namespace, overload and the underscore of an in-place operation (`add` for aten.add_.Tensor).
    args: the arguments by the names of the schema, with values in place of nodes.
    shapes: the shape of each result, None for a result that is no tensor.
    record: where rules note what they see.
    constants: numbers that the modules around the operation store as attributes. Any other number was computed in the
        forward pass, perhaps from the size of an axis.
    """

    name: str
    args: dict[str, Any]
    shapes: list[tuple[int, ...] | None]
    record: Record
    constants: frozenset[float] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return self.shape_of(0)

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Shape of a result, which must be a tensor."""
        shape = self.shapes[index]
        if shape is None:
            raise NotCovered(f"result {index} is no tensor")
        return shape

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default when absent or None."""
        value = self.args.get(name)
        return default if value is None else value

    def value(self, *names: str) -> Value:
        """The first present argument of these names, which must be a tensor."""
        name = next((n for n in names if n in self.args), names[0])
        value = self.args.get(name)
        if not isinstance(value, Value):
            raise NotCovered(f"{name} is no tensor")
        return value

    def optional(self, name: str) -> Value | None:
        """An argument that is a tensor, absent or None."""
        return None if self.args.get(name) is None else self.value(name)

    def number(self, name: str) -> float | None:
        """An argument that is a number; None when it is absent or a tensor."""
        value = self.args.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def integer(self, name: str, default: int) -> int:
        """An argument that must be an integer, or the default when absent or None."""
        value = self.get(name, default)
        if not isinstance(value, int):
            raise NotCovered(f"{name} is no integer")
        return value

    def integers(self, *names: str) -> list[int]:
        """The first present argument of these names, integers or a single one, as a list; empty when absent or None."""
        value: Any = next((self.args[n] for n in names if self.args.get(n) is not None), [])
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(n, int) for n in numbers):
            raise NotCovered(f"{names[0]} are no integers")
        return numbers

    def axis(self, name: str = "dim", rank: int | None = None, default: int = 0) -> int:
        """An argument that names a dimension, made non-negative."""
        rank = rank if rank is not None else self.value("self").rank
        if rank == 0:
            raise NotCovered("a scalar has no dimension")
        return self.integer(name, default) % rank

    def axes(self, name: str = "dim") -> list[int]:
        """An argument that names dimensions of `self`; all of them when it is absent or empty."""
        rank = self.value("self").rank
        numbers = self.integers(name)
        if numbers and rank == 0:
            raise NotCovered("a scalar has no dimension")
        return [n % rank for n in numbers] or list(range(rank))

    def items(self, name: str) -> list[Any]:
        """An argument that must be a list."""
        value = self.args.get(name)
        if not isinstance(value, (list, tuple)):
            raise NotCovered(f"{name} is no list")
        return list(value)

    def values(self, name: str) -> list[Value]:
        """The tensors in an argument that must be a list of them, not empty."""
        values = [v for v in self.items(name) if isinstance(v, Value)]
        if not values:
            raise NotCovered(f"{name} has no tensors")
        return values

    def tensors(self) -> list[Value]:
        """Every tensor among the arguments, lists opened."""
        return [
            item
            for value in self.args.values()
            for item in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(item, Value)
        ]

    def new(self, dims: Sequence[Dim], **fields: Any) -> Value:
        """A value that this call makes; it depends on data when an argument does."""
        fields.setdefault("data", any(t.data for t in self.tensors()))
        return Value(tuple(dims), **fields)

    def frozen_dims(self, reason: str, index: int = 0) -> list[Dim]:
        """Fresh frozen dimensions of the shape of a result."""
        return [fresh(extent, reason) for extent in self.shapes[index] or ()]

    def frozen(self, reason: str) -> Value:
        """A result of fresh frozen dimensions, after every axis of every argument was frozen too."""
        for value in self.tensors():
            for dim in value.dims:
                mark(dim, reason)
        return self.new(self.frozen_dims(reason))


Rule = Callable[[OpCall], "Value | list[Value]"]

ZeroRule = Callable[[list[bool]], bool]
"""Says, given which operands are zero at a masked unit, whether the result is. An operand without the axis is not."""


def never(zeros: list[bool]) -> bool:
    """The zero rule of results that need not be zero."""
    return False


def as_first(zeros: list[bool]) -> bool:
    """The zero rule of results that are zero where the first operand is."""
    return zeros[0]


def remap(dim: Dim, *, zero: bool | None = None, const: bool | None = None) -> Dim:
    """The same axes; `zero` and `const`, where given, replace what is known of the tensor along them."""
    return tuple(
        Factor(f.atom, f.zero if zero is None else zero, f.const if const is None else const) for f in expand(dim)
    )


def meet(dims: Sequence[Dim], zero: ZeroRule) -> Dim:
    """Unite one dimension of several operands, and combine what is known of the operands along it.

    A dimension of size one stands for an operand without the axis. The result is constant where all operands that have
    the axis are. Of axes that cannot be united nothing is known.
    """
    present = [dim for dim in dims if expand(dim)]
    if not present:
        return ()
    if not unite(present):
        return remap(present[0], zero=False, const=False)
    opened = [expand(dim) for dim in dims]
    met = []
    for i, factor in enumerate(expand(present[0])):
        zeros = [bool(factors) and factors[i].zero for factors in opened]
        const = all(factors[i].const for factors in opened if factors)
        met.append(Factor(factor.atom, zero(zeros), const))
    return tuple(met)


def broadcast(shape: Sequence[int], values: Sequence[Value], zero: ZeroRule) -> list[Dim]:
    """The dimensions of a result of this shape, with those of the operands united as broadcasting aligns them."""
    result: list[Dim] = []
    for i in range(len(shape)):
        positions = [i - len(shape) + value.rank for value in values]
        aligned = [value.dims[at] if at >= 0 else () for value, at in zip(values, positions, strict=True)]
        result.append(meet(aligned, zero))
    return result


def words(text: str) -> tuple[str, ...]:
    """Names of operations, written as a sentence."""
    return tuple(text.split())
