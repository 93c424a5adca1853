"""Linear layers that read the same tensor, computed in one call: their weights lie one below the other in one packed
weight, and whichever layer is called first computes the outputs of all.

The others are then called with the very same tensor and take their columns. What waits for them is kept by thread, for
one group at a time, and let go when the last has taken its part. A layer that finds nothing waiting computes all anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import nn

from secateur.runtime.linear import SparseLinear
from secateur.runtime.ops import fragment, sparse_linear


class _Waiting(threading.local):
    """What the last group computed in this thread, for the layers (their first columns) that have not been called."""

    read: torch.Tensor | None = None
    version: int | None = None
    weights = (0, 0)
    output: torch.Tensor | None = None
    starts: frozenset[int] = frozenset()

    def forget(self) -> None:
        self.read, self.output, self.starts = None, None, frozenset()


_waiting = _Waiting()


def _all_columns(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, rows: int, starts: Sequence[int], start: int
) -> torch.Tensor:
    """The outputs of all layers of a group for x, computed or found waiting."""
    version = None if x.is_inference() else x._version  # inference tensors count no versions
    weights = (packed.data_ptr(), 0 if bias is None else bias.data_ptr())
    output = _waiting.output
    same = _waiting.read is x and (_waiting.version, _waiting.weights) == (version, weights)
    if same and output is not None and start in _waiting.starts:
        _waiting.starts -= {start}
        if not _waiting.starts:
            _waiting.forget()
        return output
    _waiting.forget()
    output = sparse_linear(x, packed, bias, rows, 0)
    _waiting.read, _waiting.version, _waiting.weights = x, version, weights
    _waiting.output, _waiting.starts = output, frozenset(starts) - {start}
    return output


fragment.define(
    "sparse_linear_part(Tensor x, Tensor packed, Tensor? bias, int rows, int[] starts, int start, int stop) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _part(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    starts: Sequence[int],
    start: int,
    stop: int,
) -> torch.Tensor:
    """For graphs: an output of its own, because what a compiler writes over must belong to nobody else."""
    part = _all_columns(x, packed, bias, rows, starts, start)[..., start:stop]
    return part.clone(memory_format=torch.contiguous_format)


def _fake_part(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    starts: Sequence[int],
    start: int,
    stop: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], stop - start))


fragment.impl("sparse_linear_part", _part, "CPU")
torch.library.register_fake("secateur::sparse_linear_part", _fake_part, lib=fragment)


class PartLinear(SparseLinear):
    """Columns number `part` of a packed layer that is several: y = (x @ weight.T + bias)[..., start:stop].

    Args:
        packed: the packed weight of all layers, shared by them.
        bias: (all out_features,) float32, or None; shared as well.
        sizes: out_features of each layer.
        part: which of them this is.

    Raises:
        ValueError: when the sizes do not add up to the rows of the packed weight.
    """

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int], part: int):
        super().__init__(packed, bias)
        self.rows, self.sizes, self.part = self.out_features, tuple(sizes), part
        if sum(sizes) != self.rows or not 0 <= part < len(sizes) or min(sizes) < 1:
            raise ValueError(f"part {part} of {self.sizes} is none of a packed weight of {self.rows} rows")
        self.starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.start, self.out_features = self.starts[part], sizes[part]
        self.stop = self.start + self.out_features

    def activate(self, activation: str) -> None:
        """Nothing but 'none': the layers of a group have no activation.

        Raises:
            ValueError: for any other.
        """
        if activation != "none":
            raise ValueError(f"a layer that shares its call with others takes no activation, not {activation!r}")
        super().activate(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x (..., in_features), float32.

        Raises:
            RuntimeError: when a gradient would be needed.
        """
        self.refuse_gradients(x)
        if torch.compiler.is_compiling():
            return sparse_linear_part(x, self.packed, self.bias, self.rows, self.starts, self.start, self.stop)
        return _all_columns(x, self.packed, self.bias, self.rows, self.starts, self.start)[..., self.start : self.stop]

    def dense_weight(self) -> torch.Tensor:
        """The weight (out_features, in_features), unpacked anew at each call."""
        return super().dense_weight()[self.start : self.stop]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, outputs {self.start} to {self.stop} of {self.rows}"


def parts(packed: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]) -> list[nn.Module]:
    """The layers of one packed weight."""
    return [PartLinear(packed, bias, sizes, part) for part in range(len(sizes))]


sparse_linear_part = torch.ops.secateur.sparse_linear_part.default
