"""What a plan costs: parameters, multiply-accumulates, and latency, measured side by side or from a table."""

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from secateur.dims import extent
from secateur.errors import PlanError
from secateur.layout import Layout
from secateur.plan import Plan


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model holds (buffers left out), and how many of them are not zero."""

    total: int
    nonzero: int


def parameters(layout: Layout, plan: Plan | None = None) -> Parameters:
    """Count by the plan: `total` after removal of whole units, `nonzero` after element masks too.

    Zeros that a model came with count where they are in the plan, as `host.plan` has them.
    """
    plan = plan or Plan()
    total = nonzero = 0
    for param in layout.params:
        shape = layout.kept_shape(param, plan.keep)
        if shape is None or param in layout.buffers:
            continue
        count = int(np.prod(shape, dtype=np.int64))
        total += count
        mask = plan.mask(layout, param) if param in plan.masks else None
        nonzero += count if mask is None else int(mask.sum())
    return Parameters(total, nonzero)


def macs(layout: Layout, plan: Plan | None = None) -> int:
    """Multiply-accumulates of one forward pass on the example input that the layout was traced with.

    Counts matrix products (weights and attention); units that go are not counted, single zeros are.
    """
    keep = (plan or Plan()).keep
    sizes = layout.resized({name: units for name, units in keep.items() if layout.axis(name).path is None}).sizes
    total = 0
    for product in layout.products:
        if product.weight is not None and _removed_with_layer(layout, product.weight, keep):
            continue
        total += product.calls * int(np.prod([extent(dim, sizes) for dim in product.dims], dtype=np.int64))
    return total


def _removed_with_layer(layout: Layout, weight: str, keep: Mapping[str, np.ndarray]) -> bool:
    return any(
        layout.member_of(weight, name) is not None and layout.member_of(weight, name) not in units
        for name, units in keep.items()
    )


def unit_parameters(layout: Layout, axis: str) -> float:
    """Parameters that one unit of the axis holds, on average."""
    total = 0.0
    for param in layout.members(axis):
        if param in layout.buffers:
            continue
        shape = layout.shape(param)
        if layout.member_of(param, axis) is not None:
            total += float(np.prod(shape, dtype=np.int64))
            continue
        unowned = [float((owner < 0).mean()) for owner in layout.owners(param, axis) if owner is not None]
        share = 1.0 - float(np.prod(unowned))
        total += share * float(np.prod(shape, dtype=np.int64))
    return total / layout.axis(axis).size


def side_by_side(calls: Mapping[str, Callable[[], object]], repeats: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call, taken in turn (A B A B ...) so that drift of the machine hits all alike.

    The caller pins threads. Each measurement is one call.
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
    """What blocks of one kind and size cost on a runtime: relative change of whole-model latency when one of them is
    left with so many units (`sizes` ascending, the last is the full size, where the change is 0).
    """

    sizes: tuple[int, ...]
    changes: tuple[float, ...]

    def at(self, size: int) -> float:
        """Linear between measured sizes; below the smallest, the slope of the first piece goes on."""
        if size < self.sizes[0] and len(self.sizes) > 1:
            slope = (self.changes[1] - self.changes[0]) / (self.sizes[1] - self.sizes[0])
            return self.changes[0] + slope * (size - self.sizes[0])
        return float(np.interp(size, self.sizes, self.changes))


@dataclass(frozen=True)
class LatencyTable:
    """Latency on one runtime as a sum over blocks: `dense_ms` and a curve for each axis that can be pruned."""

    runtime: str
    batch: int
    length: int
    threads: int
    dense_ms: float
    curves: Mapping[str, Curve]
    """Curve by group of equal axes."""
    axes: Mapping[str, str]
    """Group of each axis."""
    together: float = 0.0
    """What cutting every axis to half changes beyond the sum of its curves: smaller activations share a cache."""

    def share(self, sizes: Mapping[str, int]) -> float:
        """Latency over that of the dense model; `sizes` gives units left of an axis, all of it where not named."""
        unknown = next((name for name in sizes if name not in self.axes), None)
        if unknown is not None:
            raise PlanError(f"the latency table has no axis {unknown!r}; it has {', '.join(self.axes)}")
        alone = sum(self.curves[self.axes[name]].at(size) for name, size in sizes.items())
        return 1.0 + alone + self.together * self._depth(sizes)

    def _depth(self, sizes: Mapping[str, int]) -> float:
        """How far all groups are cut together: 0 while one of them is whole, 1 with every axis at half."""
        depth = 1.0
        for group, curve in self.curves.items():
            full = curve.sizes[-1]
            axes = [name for name, of in self.axes.items() if of == group]
            cut = statistics.fmean(1 - sizes.get(name, full) / full for name in axes)
            depth *= cut / (1 - (full // 2) / full)
        return depth if len(self.curves) > 1 else 0.0

    def predict(self, sizes: Mapping[str, int]) -> float:
        """Milliseconds of a forward pass at the table's batch and length."""
        return self.dense_ms * self.share(sizes)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "LatencyTable":
        """From what `as_json` gave."""
        curves = {k: Curve(tuple(c["sizes"]), tuple(c["changes"])) for k, c in data["curves"].items()}
        return LatencyTable(**{**data, "curves": curves})


def latency(runtime: str, host: Any, **options: Any) -> LatencyTable:
    """A table of block latencies of a model measured on a runtime (onnx, openvino, executorch, litert, torch): what
    each number of heads and FFN neurons costs. Kept by runtime, machine, shape and layout.

    options: batch, length, threads, points (sizes measured of each kind of block), step (wide axes are measured at its
    multiples, where it is exact), turns, cache.
    Raises DeployError when the runtime is not there or refuses the model.
    """
    return importlib.import_module("secateur.deploy.jobs.latency_table").latency_table(host, runtime, **options)
