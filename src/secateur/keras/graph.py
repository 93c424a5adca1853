"""AxisGraph: the values of tensors and dimensions of weights that rules note while they describe a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from secateur.keras.atoms import Atom, Factors, Value, atoms_in, freeze, join, plain
from secateur.keras.trace import LayerCall


@dataclass(frozen=True)
class Read:
    """A weight that multiplies activations: the tensor it reads, its contracted dimensions, and how often it runs."""

    tensor: Any
    contracted: tuple[int, ...]
    calls: int


class AxisGraph:
    """State of one description.

    batch, length: sizes of the open dimensions of inputs, for multiply-accumulates only.
    """

    def __init__(self, batch: int = 1, length: int = 1) -> None:
        self.values: dict[int, Value] = {}
        self.weights: dict[int, Value] = {}
        self.variables: dict[int, Any] = {}
        self.reads: dict[int, Read] = {}
        self.attentions: list[tuple[Any, Atom, Any]] = []
        self.products: list[tuple[int | None, int, Value]] = []
        self.depth = -1
        self.batch, self.length = batch, length
        self._keep: list[Any] = []

    def value(self, tensor: Any) -> Value:
        """The value noted for a symbolic tensor, or its plain dimensions."""
        return self.values.get(id(tensor)) or plain(tensor.shape)

    def put(self, tensor: Any, value: Value) -> None:
        """Note the value of a tensor; where their ranks differ, the tensor is plain, and the value frozen."""
        if len(value) != len(tensor.shape):
            self.freeze(value, "the shape of a tensor is not understood")
            value = plain(tensor.shape)
        self._keep.append(tensor)
        self.values[id(tensor)] = value

    def new(self, size: int, kind: str, frozen: str | None = None) -> Factors:
        """A dimension that is one new axis."""
        return (Atom(size, kind, self.depth, frozen),)

    def known(self, variable: Any, dim: int, size: int, kind: str) -> Factors:
        """The dimension of a weight that was seen before (a layer called twice), or a new axis."""
        return self.weights[id(variable)][dim] if id(variable) in self.weights else self.new(size, kind)

    def weight(self, variable: Any, dims: Value, reason: str = "a shared weight has two readings") -> None:
        """Note the dimensions of a weight."""
        self.variables[id(variable)] = variable
        earlier = self.weights.get(id(variable))
        self.weights[id(variable)] = dims
        if earlier is not None:
            for a, b in zip(earlier, dims, strict=True):
                join(a, b, reason)

    def linear(self, variable: Any, dims: Value, tensor: Any, contracted: Sequence[int], positions: Value) -> None:
        """A weight that multiplies a tensor; positions: the dimensions over which it runs."""
        self.weight(variable, dims)
        calls = self.count(positions)
        self.reads[id(variable)] = Read(tensor, tuple(contracted), calls)
        self.products.append((id(variable), calls, dims))
        self._keep.append(tensor)

    def count(self, dims: Value, first: int = 0) -> int:
        """How many positions dimensions have on the example; `first` is the number of the first of them."""
        total = 1
        for index, factors in enumerate(dims, first):
            for factor in factors:
                size = factor.root().size if isinstance(factor, Atom) else factor
                total *= size if size is not None else (self.batch if index == 0 else self.length)
        return total

    def freeze(self, value: Value, reason: str) -> None:
        """Freeze every axis of a tensor."""
        for factors in value:
            freeze(factors, reason)

    def opaque(self, step: LayerCall, reason: str) -> None:
        """Nothing is known of a step: freeze the tensors that it reads; those that it returns are plain."""
        for tensor in step.tensors():
            self.freeze(self.value(tensor), reason)
        for output in step.outputs:
            self.put(output, plain(output.shape))

    def broadcast(self, values: Sequence[Value], reason: str) -> Value:
        """The dimensions of an element-wise result."""
        rank = max(len(value) for value in values)
        result: list[Factors] = []
        for position in range(rank):
            dim: Factors = (1,)
            for value in values:
                offset = position - (rank - len(value))
                if offset < 0 or value[offset] == (1,):
                    continue
                dim = value[offset] if dim == (1,) else join(dim, value[offset], reason)
            result.append(dim)
        return tuple(result)

    def constant(self, array: Any) -> Value | None:
        """The value of an argument that is no symbolic tensor: axes for a variable, plain dimensions for an array."""
        if isinstance(array, keras.Variable):
            if id(array) not in self.weights:
                frozen = f"{array.name} is used outside of a layer that is known"
                kinds = ["position"] * (len(array.shape) - 1) + ["hidden"]
                pairs = zip(array.shape, kinds, strict=False)
                self.weight(array, tuple(self.new(n, kind, frozen) if n > 1 else (1,) for n, kind in pairs))
            return self.weights[id(array)]
        shape = getattr(array, "shape", None)
        return None if shape is None else plain(tuple(shape))

    def is_plain(self, value: Value) -> bool:
        """Whether no dimension carries an axis."""
        return not any(atoms_in(factors) for factors in value)
