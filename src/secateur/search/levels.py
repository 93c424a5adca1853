"""Levels: for every axis the order in which its units go, and the expected divergence at each size.

Removal is nested, so an order and a curve are the whole database.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from secateur.arrays import to_numpy
from secateur.errors import PlanError, shown
from secateur.host import Host
from secateur.layout import Axis, Layout
from secateur.repair.removable import Removable, removable
from secateur.repair.structured import centred, fisher_order, kfac_order
from secateur.stats import Stats

METHODS = ("kfac", "fisher")
"""How units are ordered: by K-FAC with weights that make up for them, or by squared gradients of gates."""


@dataclass(frozen=True)
class AxisLevels:
    """One axis.

    order: its units in the order in which they go, (units,).
    losses: expected divergence from the dense model, per example, when the first k units of `order` are gone and the
        weights that read the axis have made up for them; (units + 1,), from 0 upwards. Infinite where the model cannot
        run with so few. Under `fisher` it is the divergence if nothing makes up for them.
    weight: the linear weight that makes up for the units that go; None where nothing does.
    bias: the bias of that layer, which makes up too; None where it has none.
    """

    axis: str
    kind: str
    order: np.ndarray
    losses: np.ndarray
    weight: str | None = None
    bias: str | None = None

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


def levels_of(host: Host, stats: Stats, method: str = "kfac", *, only: Collection[str] | None = None) -> Levels:
    """The levels of every axis whose units can go, without those of layers (see `layers_of`).

    stats: of `secateur.search.collected.collected`. method: one of `METHODS`. An axis that no single matrix reads is
    ordered by `fisher` in both. only: the axes that are wanted, of which `stats` are; None for all.

    Raises PlanError for another method.
    """
    if method not in METHODS:
        raise PlanError(f"there is no method {shown(method)}; choose {' or '.join(METHODS)}")
    found, notes = removable(host.layout)
    notes |= {
        axis.name: f"{axis.name} stays whole, as it is frozen: {axis.frozen}"
        for axis in host.layout.of_kind("layer", prunable=False)
        if axis.frozen
    }
    axes = {}
    for name, axis in found.items():
        if only is not None and name not in only:
            continue
        if stats.has("fisher_gate", name):
            axes[name] = _axis_levels(host, stats, axis, method)
        else:
            notes[name] = f"{name} stays whole, as no gradient reached it on this data"
    return Levels(method, axes, notes=notes)


def layers_of(layout: Layout, divergence: Callable[[Mapping[str, tuple[int, ...]]], float]) -> dict[str, np.ndarray]:
    """The divergence of the model without each single layer, by axis of layers; frozen ones are left out.

    divergence: axis of layers -> the layers that go, to the divergence that is measured then.
    """
    return {
        axis.name: np.array([divergence({axis.name: (layer,)}) for layer in range(axis.size)])
        for axis in layout.of_kind("layer")
        if axis.size > 1
    }


def _axis_levels(host: Host, stats: Stats, found: Removable, method: str) -> AxisLevels:
    """One axis, of which gradients of gates were collected."""
    layout, axis = host.layout, host.layout.axis(found.axis)
    weight = found.weight
    if weight is not None and (not stats.has("fisher_in", weight) or _has_zeros(host, weight)):
        weight = None
    bias = None if weight is None else _bias_of(layout, weight)
    if method == "kfac" and weight is not None:
        inputs = to_numpy(stats.mean("fisher_in", weight))
        if bias is not None:
            inputs = centred(inputs, to_numpy(stats.mean("fisher_mean", weight)))
        in_dim = layout.linears[weight].in_dim
        matrix = to_numpy(host.read(weight))
        owner = layout.owners(weight, axis.name)[in_dim]
        assert owner is not None
        outputs = to_numpy(stats.mean("fisher_out", weight))
        order, losses = kfac_order(matrix if in_dim else matrix.T, inputs, outputs, owner)
    else:
        order, losses = fisher_order(to_numpy(stats.mean("fisher_gate", axis.name)))
    return AxisLevels(axis.name, axis.kind, order, _permitted(axis, losses), weight, bias)


def _has_zeros(host: Host, weight: str) -> bool:
    """Whether the weight has zeros that have to stay, so that a refit would undo them."""
    plan = getattr(host, "plan", None)
    return plan is not None and weight in plan.masks


def _bias_of(layout: Layout, weight: str) -> str | None:
    """The bias beside a weight, or None."""
    name = f"{weight.removesuffix('weight')}bias"
    return name if weight.endswith("weight") and name in layout.params else None


def _permitted(axis: Axis, losses: np.ndarray) -> np.ndarray:
    """The losses, infinite at sizes that `Layout.check_keep` refuses: none left, or no multiple of what is wanted."""
    sizes = np.arange(axis.size, -1, -1)
    return np.where((sizes > 0) & (sizes % axis.multiple == 0) | (sizes == axis.size), losses, np.inf)
