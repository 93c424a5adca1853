"""Levels: for every axis the order in which its units go, and the expected divergence at each size.

Removal is nested, so an order and a curve are the whole database.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class AxisLevels:
    """One axis.

    order: its units in the order in which they go, (units,).
    losses: expected divergence from the dense model, per example, when the first k units of `order` are gone and the
        weights that read the axis have made up for them; (units + 1,), from 0 upwards. Infinite where the model cannot
        run with so few.
    """

    axis: str
    kind: str
    order: np.ndarray
    losses: np.ndarray

    @property
    def size(self) -> int:
        """The number of units of the whole axis."""
        return len(self.order)

    def kept(self, count: int) -> np.ndarray:
        """The units that stay when `count` of them do, sorted."""
        return np.sort(self.order[self.size - count :])


@dataclass(frozen=True)
class Levels:
    """All axes that can be searched.

    method: `kfac` or `fisher`, by which units were ordered.
    axes: axis -> its levels.
    layers: axis of layers -> measured divergence of the model without each layer, (layers,).
    notes: axes that are not searched, and why.
    """

    method: str
    axes: Mapping[str, AxisLevels]
    layers: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
