"""Stats: running sums of the quantities that criteria read. To merge two of them is to add them, so that every split
of the data, over batches or over machines, gives the same sums.

A criterion asks for a quantity by the name of a parameter; the tables below list the quantities that a Host collects.
A criterion receives the mean: the sum divided by the number of items that were summed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from secateur.arrays import Array, to_numpy
from secateur.errors import DataError
from secateur.files import new_file
from secateur.layout import Layout
from secateur.schemas.reading import check, parse
from secateur.schemas.stats import StatsNotes

FORMAT = 1
METADATA = "secateur"
"""The entry of a safetensors header that holds counts and notes."""
_REMEDY = "delete it, and the statistics are collected again"

OF_WEIGHT = {
    "grad": "dL/dw of the mean loss over the data: over all labels that count; shape of the parameter",
    "grad_sq": "(dL/dw)^2, mean over batches; shape of the parameter",
    "act_sq": "square of each input of a linear weight, mean over tokens; shape (in,)",
    "gram": "product x x^T of the inputs of a linear weight, mean over tokens; shape (in, in). Weights that read the "
    "same tensor share one, under the name of the first of them (`Layout.readers`)",
    "fisher_in": "|g|^2 x x^T of the inputs of a linear weight, g = dD/d(its output), mean over |g|^2; shape (in, in)",
    "fisher_mean": "|g|^2 x of the inputs of a linear weight, mean over |g|^2; shape (in,)",
    "fisher_out": "g g^T at the output of a linear weight, summed over tokens, mean over examples; shape (out, out)",
}
"""Quantities kept for each parameter."""

OF_AXIS = {
    "unit_act": "|activation| of each unit where it is consumed, mean over tokens",
    "unit_grad_sq": "square of dL/d(gate of the unit), mean over batches",
    "fisher_gate": "square of dD/d(gate of the unit), mean over examples",
    "attn_sum": "sum over i, j of softmax weight A_ij, mean over query tokens: 1 for every head",
    "attn_mass": "sum over j of |A_ij V_j|, mean over query tokens i",
    "attn_output": "|sum over j of A_ij V_j W_O|, mean over query tokens i",
    "attn_confidence": "max over j of A_ij, mean over query tokens i",
    "attn_entropy": "-sum over j of A_ij log A_ij in nats, mean over query tokens i",
    "expert_routed": "1 where the router sends a token to the expert, else 0; mean over tokens",
    "expert_output": "|gate weight times output of the expert| where a token is sent to it, else 0; mean over tokens",
}
"""Quantities kept for each unit of an axis; shape (axis size,)."""

NEEDS_GRADIENT = {"grad", "grad_sq", "unit_grad_sq"}
"""Quantities that need a backward pass."""

OF_DIVERGENCE = {"fisher_in", "fisher_mean", "fisher_out", "fisher_gate"}
"""Quantities of the curvature of a task's divergence, for which D is a random score: `Task.fisher_loss` in
`secateur.tasks.base.task`. `secateur.torch.stats.curvature` collects them.
"""


@dataclass(frozen=True)
class Stats:
    """Running sums.

    sums: quantity -> parameter or axis -> sum.
    counts: quantity -> parameter or axis -> number of items (tokens, labels, batches) in the sum.
    """

    sums: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def merge(self, other: "Stats") -> "Stats":
        """The sums of both; commutative and associative, and `Stats()` is its neutral element."""
        sums = {quantity: dict(entries) for quantity, entries in self.sums.items()}
        counts = {quantity: dict(entries) for quantity, entries in self.counts.items()}
        for quantity, entries in other.sums.items():
            mine, tally = sums.setdefault(quantity, {}), counts.setdefault(quantity, {})
            for key, value in entries.items():
                mine[key] = mine[key] + value if key in mine else value
                tally[key] = tally.get(key, 0.0) + other.counts[quantity][key]
        return Stats(sums, counts)

    def has(self, quantity: str, key: str) -> bool:
        """Whether the quantity was collected for a parameter or axis."""
        return key in self.sums.get(quantity, {})

    def mean(self, quantity: str, key: str) -> Array:
        """Sum divided by count; DataError when nothing was collected."""
        if not self.has(quantity, key):
            raise DataError(f"no {quantity} was collected for {key}; the data never reached it")
        return self.sums[quantity][key] / self.counts[quantity][key]

    def save(self, path: Path | str, notes: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, whole or not at all; what lies there is replaced. notes: kept beside the sums."""
        arrays = {
            f"{quantity}/{key}": np.ascontiguousarray(to_numpy(value))
            for quantity, entries in self.sums.items()
            for key, value in entries.items()
        }
        told = {"format": FORMAT, "counts": self.counts, "notes": dict(notes or {})}
        with new_file(Path(path), overwrite=True) as temporary:
            save_file(arrays, temporary, metadata={METADATA: json.dumps(told)})

    @staticmethod
    def load(path: Path | str) -> "tuple[Stats, dict[str, str]]":
        """Read what `save` wrote: the sums as numpy arrays, and the notes. DataError when the file is damaged."""
        try:
            with safe_open(Path(path), "np") as file:
                text = (file.metadata() or {}).get(METADATA, "")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            told = check(parse(text), StatsNotes, str(path), error=DataError, remedy=_REMEDY)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {_REMEDY}") from None
        names = {f"{quantity}/{key}" for quantity, entries in told.counts.items() for key in entries}
        if names != set(arrays):
            raise DataError(f"{path} is damaged: its sums and its counts have other names; {_REMEDY}")
        sums = {q: {key: arrays[f"{q}/{key}"] for key in entries} for q, entries in told.counts.items()}
        return Stats(sums, {q: dict(entries) for q, entries in told.counts.items()}), dict(told.notes)


class Tally:
    """Collects a Stats over one pass of data; sums are added in place, so that memory does not grow with the data."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Array]] = {}
        self._counts: dict[str, dict[str, float]] = {}

    def add(self, quantity: str, key: str, value: Array, count: float) -> None:
        """Add a partial sum over `count` items."""
        sums = self._sums.setdefault(quantity, {})
        counts = self._counts.setdefault(quantity, {})
        if key in sums:
            sums[key] += value
        else:
            sums[key] = value
        counts[key] = counts.get(key, 0.0) + count

    def add_gates(self, layout: Layout, products: Mapping[str, Array], axes: Iterable[str]) -> None:
        """Add "unit_grad_sq" of one batch.

        products: linear weight -> w dL/dw, in its shape. axes: those whose units are wanted.
        A gate on the output of a unit scales the weights that read it: dL/dgate = sum over them of w dL/dw.
        """
        for axis in axes:
            readers = [name for name in products if layout.reads(name, axis)]
            if readers:
                gate = sum(layout.reduce(name, products[name], axis) for name in readers)
                self.add("unit_grad_sq", axis, gate**2, 1)

    def stats(self) -> Stats:
        """The sums so far."""
        return Stats(self._sums, self._counts)
