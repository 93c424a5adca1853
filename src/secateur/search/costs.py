"""Costs: what a candidate costs, as a sum over axes, so that a choice can be made axis by axis."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from secateur.search.candidate import Candidate
from secateur.search.target import Limit


@dataclass(frozen=True)
class Cost:
    """One quantity of one limit, relative to the dense model.

    limit: what is limited.
    dense: cost of the dense model, in the unit of the limit.
    curves: axis -> change relative to the dense cost when n units stay, n = 0 ... size; (size + 1,), 0 at the end. NaN
        never; sizes that the runtime dislikes are not left out here but in `allowed`.
    allowed: axis -> numbers of units worth having, ascending, the last one the full size.
    layers: axis of layers -> change for each layer that goes, its axes included.
    correction: what predictions are multiplied by, after a measurement.
    """

    limit: Limit
    dense: float
    curves: Mapping[str, np.ndarray]
    allowed: Mapping[str, np.ndarray]
    layers: Mapping[str, float] = field(default_factory=dict)
    correction: float = 1.0

    @property
    def bound(self) -> float:
        """The most a candidate may cost, relative to the dense model."""
        return self.limit.bound if self.limit.relative else self.limit.bound / self.dense

    def of(self, candidate: Candidate) -> float:
        """The predicted cost of a candidate, relative to the dense model."""
        change = sum(float(self.curves[axis][count]) for axis, count in candidate.kept.items() if axis in self.curves)
        change += sum(self.layers.get(axis, 0.0) * len(gone) for axis, gone in candidate.dropped.items())
        return (1.0 + change) * self.correction
