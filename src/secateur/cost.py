"""What a plan costs: parameters, multiply-accumulates, and latency, measured side by side or predicted from a table."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from secateur.dims import extent, names
from secateur.errors import PlanError
from secateur.layout import Layout, Product
from secateur.plan import Plan


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, without buffers, and how many of them are not zero."""

    total: int
    nonzero: int


def parameters(layout: Layout, plan: Plan | None = None) -> Parameters:
    """Count the parameters that a plan leaves: `total` after removal of whole units, `nonzero` after element masks too.

    Zeros that were in the model before pruning count as zeros where the plan contains them, as `host.plan` does.
    """
    plan = plan or Plan()
    total = nonzero = 0
    for param in layout.params:
        shape = layout.kept_shape(param, plan.keep)
        if shape is None or param in layout.buffers:
            continue
        count = math.prod(shape)
        total += count
        mask = plan.mask(layout, param) if param in plan.masks else None
        nonzero += count if mask is None else int(mask.sum())
    return Parameters(total, nonzero)


def macs(layout: Layout, plan: Plan | None = None) -> int:
    """Multiply-accumulates of one forward pass on the example input that the layout was traced with.

    Counts matrix products (of weights, and in attention). Removed units do not count; single weights that are zero do.
    """
    keep = (plan or Plan()).keep
    sizes = layout.resized({name: units for name, units in keep.items() if layout.axis(name).path is None}).sizes
    lists = {name: units for name, units in keep.items() if layout.axis(name).path is not None}
    inside = layer_of_axes(layout) if lists else {}
    total = 0
    for product in layout.products:
        elements = [(element_of(layout, product, name, inside), units) for name, units in lists.items()]
        if any(element is not None and element not in units for element, units in elements):
            continue
        total += product.calls * math.prod([extent(dim, sizes) for dim in product.dims])
    return total


def element_of(layout: Layout, product: Product, outer: str, inside: Mapping[str, tuple[str, int]]) -> int | None:
    """The element of a list of modules that a product belongs to: that of its weight, or, for a product of activations,
    that in which its axes lie. inside: as `layer_of_axes` returns it.
    """
    if product.weight is not None:
        return layout.member_of(product.weight, outer)
    elements = [inside[name][1] for dim in product.dims for name in names(dim) if inside.get(name, ("",))[0] == outer]
    return elements[0] if elements else None


def layer_of_axes(layout: Layout) -> dict[str, tuple[str, int]]:
    """Axis -> (axis of layers, layer) for each axis whose parameters all lie in one element of a list of layers."""
    found: dict[str, tuple[str, int]] = {}
    for outer in layout.of_kind("layer", prunable=False):
        for axis in layout.axes.values():
            layers = {layout.member_of(param, outer.name) for param in layout.members(axis.name)}
            if axis.name != outer.name and len(layers) == 1 and None not in layers:
                found[axis.name] = (outer.name, next(layer for layer in layers if layer is not None))
    return found


def unit_parameters(layout: Layout, axis: str) -> float:
    """Parameters that one unit of the axis holds, on average."""
    total = 0.0
    for param in layout.members(axis):
        if param in layout.buffers:
            continue
        shape = layout.shape(param)
        if layout.member_of(param, axis) is not None:
            total += math.prod(shape)
            continue
        unowned = [float((owner < 0).mean()) for owner in layout.owners(param, axis) if owner is not None]
        share = 1.0 - float(np.prod(unowned))  # of the parameter that belongs to units of the axis
        total += share * math.prod(shape)
    return total / layout.axis(axis).size


def side_by_side(calls: Mapping[str, Callable[[], object]], repeats: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call. They run in turn (A B A B ...), so that drift of the machine affects all alike.

    The caller sets the number of threads. Each measurement is one call.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seen.items()}


@dataclass(frozen=True)
class Curve:
    """What axes of one kind and size cost on a runtime.

    sizes: numbers of units, ascending; the last is the full size.
    changes: relative change of the latency of the whole model when one axis has that many units; 0 at the full size.
    """

    sizes: tuple[int, ...]
    changes: tuple[float, ...]

    def at(self, size: int) -> float:
        """The change at a size: linear between measured sizes; below them, on the line through the two smallest."""
        if size < self.sizes[0] and len(self.sizes) > 1:
            slope = (self.changes[1] - self.changes[0]) / (self.sizes[1] - self.sizes[0])
            return self.changes[0] + slope * (size - self.sizes[0])
        return float(np.interp(size, self.sizes, self.changes))


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a model on one runtime: that of the dense model, changed by a curve for each axis that can be pruned.

    batch, length, threads: the calls that were measured.
    dense_ms: milliseconds of the dense model.
    curves: group of equal axes -> its curve.
    axes: axis -> its group.
    together: what cutting every axis to half changes beyond the sum of its curves: smaller activations share a cache.
    layers: axis of layers -> relative change of the latency when one of its layers goes, with the axes in it.
    """

    runtime: str
    batch: int
    length: int
    threads: int
    dense_ms: float
    curves: Mapping[str, Curve]
    axes: Mapping[str, str]
    together: float = 0.0
    layers: Mapping[str, float] = field(default_factory=dict)

    def share(self, sizes: Mapping[str, int], dropped: Mapping[str, int] | None = None) -> float:
        """Latency relative to that of the dense model.

        sizes: axis -> units that are left; axes without an entry are whole, and none lies in a layer that went.
        dropped: axis of layers -> number of layers that went.

        Raises PlanError for an axis the table lacks.
        """
        dropped = dropped or {}
        unknown = next((name for name in sizes if name not in self.axes), None)
        unknown = unknown or next((name for name in dropped if name not in self.layers), None)
        if unknown is not None:
            known = ", ".join([*self.axes, *self.layers])
            raise PlanError(f"the latency table has no axis {unknown!r}; it has {known}")
        change = sum(self.curves[self.axes[name]].at(size) for name, size in sizes.items())
        change += sum(self.layers[name] * count for name, count in dropped.items())
        return 1.0 + change + self.together * self._depth(sizes)

    def _depth(self, sizes: Mapping[str, int]) -> float:
        """How far all groups are cut together: 0 while one of them is whole, 1 when every axis is at half."""
        depth = 1.0
        for group, curve in self.curves.items():
            full = curve.sizes[-1]
            axes = [name for name, its_group in self.axes.items() if its_group == group]
            cut = statistics.fmean(1 - sizes.get(name, full) / full for name in axes)
            depth *= cut / (1 - (full // 2) / full)
        return depth if len(self.curves) > 1 else 0.0

    def predict(self, sizes: Mapping[str, int]) -> float:
        """Milliseconds of a forward pass at the table's batch and length."""
        return self.dense_ms * self.share(sizes)

    def as_json(self) -> dict[str, Any]:
        """The table as values that JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "LatencyTable":
        """Read what `as_json` writes."""
        curves = {k: Curve(tuple(c["sizes"]), tuple(c["changes"])) for k, c in data["curves"].items()}
        return LatencyTable(**{**data, "curves": curves})
