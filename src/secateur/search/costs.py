"""Costs: what a candidate costs, as a sum over axes, so that a choice can be made axis by axis.

Parameters, multiply-accumulates and bytes are counted exactly. Latency comes from a table that was measured on the
runtime, and memory from two measurements.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from secateur.arrays import to_numpy
from secateur.cost import LatencyTable, element_of, layer_of_axes
from secateur.deploy.gguf import quantise
from secateur.deploy.jobs.latency_table import STEP, groups_of, latency_table, peaks
from secateur.deploy.jobs.timing import Say
from secateur.dims import Dim, extent
from secateur.layout import Axis, Layout
from secateur.search.candidate import Candidate
from secateur.search.target import Call, Limit, Target
from secateur.torch.host import TorchHost

POINTS = 2
"""Sizes of a curve of latency, the full one included: each of the others takes an export, and curves are nearly
straight; a result is measured in the end anyway, and corrects them."""


@dataclass(frozen=True)
class Cost:
    """One quantity of one limit, relative to the dense model.

    limit: what is limited.
    dense: cost of the dense model, in the unit of the limit.
    curves: axis -> change relative to the dense cost when n units stay, n = 0 ... size; (size + 1,), 0 at the end. NaN
        never; sizes that the runtime dislikes are not left out here but in `allowed`.
    allowed: axis -> numbers of units worth having, ascending, the last one the full size.
    layers: axis of layers -> change when each of its layers goes, with the axes in it; (layers,).
    correction: what predictions are multiplied by, after a measurement.
    """

    limit: Limit
    dense: float
    curves: Mapping[str, np.ndarray]
    allowed: Mapping[str, np.ndarray]
    layers: Mapping[str, np.ndarray] = field(default_factory=dict)
    correction: float = 1.0

    @property
    def bound(self) -> float:
        """The most a candidate may cost, relative to the dense model."""
        return self.limit.bound if self.limit.relative else self.limit.bound / self.dense

    def of(self, candidate: Candidate) -> float:
        """The predicted cost of a candidate, relative to the dense model."""
        change = sum(float(self.curves[axis][count]) for axis, count in candidate.kept.items() if axis in self.curves)
        change += sum(
            float(self.layers[axis][list(gone)].sum())
            for axis, gone in candidate.dropped.items()
            if axis in self.layers
        )
        return (1.0 + change) * self.correction


def costs_of(
    target: Target,
    host: TorchHost,
    *,
    tables: Mapping[Call, LatencyTable] | None = None,
    widths: Mapping[str, int] | None = None,
    step: int = STEP,
    cache: bool = True,
    say: Say = lambda text: None,
) -> tuple[Cost, ...]:
    """A cost for each limit of a target, in order. Where nothing is limited: the latency of the target's call, else the
    parameters, with a bound of 1 that everything meets.

    tables: latency tables that are there already; others are measured, or taken from the cache where `cache`.
    widths: what `widths_of` gives, for a host whose weights are elsewhere.
    step: as `allowed_sizes` takes it. say: gets a line of text for each step of a measurement.

    Raises DeployError when a runtime is not there or refuses the model.
    """
    known = dict(tables or {})
    free = Limit("params", 1.0) if target.call is None else Limit("latency", 1.0, call=target.call)
    limits = target.limits or (free,)
    made = []
    for limit in limits:
        if limit.quantity == "latency":
            call = _call_of(limit)
            if call not in known:
                known[call] = table_of(host, call, cache=cache, say=say)
            made.append(latency_cost(known[call], limit, host.layout, step, block_of(call)))
        elif limit.quantity == "memory":
            call = _call_of(limit)
            shape: dict[str, Any] = {"batch": call.batch, "length": call.length, "threads": call.threads}
            measured = peaks(host, call.runtime, **shape, quantize=call.quantize, say=say)
            made.append(memory_cost(host.layout, limit, measured, widths_of(host), step, block_of(call)))
        elif limit.quantity == "bytes":
            made.append(bytes_cost(host.layout, limit, widths or widths_of(host), step))
        else:
            made.append({"params": params_cost, "macs": macs_cost}[limit.quantity](host.layout, limit, step))
    return tuple(rounded(cost, host.layout, target.round) for cost in made)


def _call_of(limit: Limit) -> Call:
    if limit.call is None:
        raise AssertionError(f"a limit of {limit.quantity} has a call")
    return limit.call


def block_of(call: Call) -> int:
    """The neurons that the runtime of a call stores together: other numbers of them are filled up, or take more."""
    return 1 if call.quantize is None else quantise.block_of(quantise.find(call.quantize))


def table_of(host: TorchHost, call: Call, *, cache: bool = True, say: Say = lambda text: None) -> LatencyTable:
    """The latency table of a model at a call, with `POINTS` sizes a curve; from the cache, where it is there."""
    return latency_table(
        host,
        call.runtime,
        batch=call.batch,
        length=call.length,
        threads=call.threads,
        points=POINTS,
        together=False,
        quantize=call.quantize,
        cache=cache,
        say=say,
    )


def widths_of(host: TorchHost) -> dict[str, int]:
    """Parameter -> bytes of one of its numbers."""
    return {name: to_numpy(host.read(name)).dtype.itemsize for name in host.layout.params}


# -- what is counted --------------------------------------------------------------------------------------------------


def params_cost(layout: Layout, limit: Limit, step: int = STEP) -> Cost:
    """Parameters, exactly as `secateur.cost.parameters` counts them."""
    return _weights_cost(layout, limit, lambda param: 1, step)


def bytes_cost(layout: Layout, limit: Limit, widths: Mapping[str, int], step: int = STEP) -> Cost:
    """Bytes of the weights as they are saved, without zeros that are packed. widths: bytes of a number by parameter."""
    return _weights_cost(layout, limit, lambda param: widths[param], step)


def macs_cost(layout: Layout, limit: Limit, step: int = STEP) -> Cost:
    """Multiply-accumulates, exactly as `secateur.cost.macs` counts them."""
    sizes = layout.sizes
    counts = [product.calls * _extents(product.dims, sizes) for product in layout.products]
    total = float(sum(counts))
    curves = {}
    for axis in _axes(layout):
        varied: Any = {**sizes, axis.name: np.arange(axis.size + 1)}
        costs: np.ndarray = np.zeros(axis.size + 1)
        for product in layout.products:
            costs = costs + product.calls * _extents(product.dims, varied)
        curves[axis.name] = (costs - costs[-1]) / total
    inside, layers = layer_of_axes(layout), {}
    for outer in layout.of_kind("layer"):
        change = np.zeros(outer.size)
        for product, count in zip(layout.products, counts, strict=True):
            layer = element_of(layout, product, outer.name, inside)
            if layer is not None:
                change[layer] -= count / total
        layers[outer.name] = change
    return Cost(limit, total, curves, allowed_sizes(layout, step), layers)


def _weights_cost(layout: Layout, limit: Limit, width: Callable[[str], int], step: int) -> Cost:
    """A cost that is a sum over parameters, of `width` for each of their numbers."""
    sizes = layout.sizes
    counted = [param for param in layout.params if param not in layout.buffers]
    total = float(sum(width(param) * _extents(layout.params[param], sizes) for param in counted))
    curves = {}
    for axis in _axes(layout):
        varied: Any = {**sizes, axis.name: np.arange(axis.size + 1)}
        costs: np.ndarray = np.zeros(axis.size + 1)
        for param in counted:
            if layout.carries(param, axis.name):
                costs = costs + width(param) * _extents(layout.params[param], varied)
        curves[axis.name] = (costs - costs[-1]) / total
    layers = {}
    for outer in layout.of_kind("layer"):
        change = np.zeros(outer.size)
        for param in counted:
            layer = layout.member_of(param, outer.name)
            if layer is not None:
                change[layer] -= width(param) * _extents(layout.params[param], sizes) / total
        layers[outer.name] = change
    return Cost(limit, total, curves, allowed_sizes(layout, step), layers)


def _extents(dims: tuple[Dim, ...], sizes: Any) -> Any:
    """The number of elements; an array where the size of an axis is one."""
    return math.prod([extent(dim, sizes) for dim in dims])


# -- what is measured -------------------------------------------------------------------------------------------------


def latency_cost(table: LatencyTable, limit: Limit, layout: Layout, step: int = STEP, block: int = 1) -> Cost:
    """Latency by a table that was measured on the runtime. step, block: as `allowed_sizes` takes them."""
    curves = {
        axis: np.array([table.curves[group].at(count) for count in range(layout.axis(axis).size + 1)])
        for axis, group in table.axes.items()
    }
    layers = {axis: np.full(layout.axis(axis).size, change) for axis, change in table.layers.items()}
    return Cost(limit, table.dense_ms, curves, allowed_sizes(layout, step, block), layers)


def memory_cost(
    layout: Layout,
    limit: Limit,
    measured: tuple[int, int],
    widths: Mapping[str, int],
    step: int = STEP,
    block: int = 1,
) -> Cost:
    """Peak memory of a process that runs the model: a part that follows the bytes of the weights, and a fixed rest.

    measured: peak bytes of the dense model, and of the model with every axis at half, from `latency_table.peaks`. The
    difference for each byte of weights that went is what a byte of weights takes (runtimes hold some twice, and
    activations shrink along); the rest is the runtime itself.
    """
    weights = bytes_cost(layout, limit, widths, step)
    halves = Candidate({axis.name: axis.size // 2 for axis in _axes(layout)})
    gone = weights.dense * (1.0 - weights.of(halves))
    slope = max(0.0, measured[0] - measured[1]) / gone if gone > 0 else 0.0
    factor = slope * weights.dense / measured[0]
    return replace(
        weights,
        dense=float(measured[0]),
        curves={axis: factor * curve for axis, curve in weights.curves.items()},
        allowed=allowed_sizes(layout, step, block),
        layers={axis: factor * change for axis, change in weights.layers.items()},
    )


# -- sizes that are worth having --------------------------------------------------------------------------------------


def allowed_sizes(layout: Layout, step: int = STEP, block: int = 1) -> dict[str, np.ndarray]:
    """Axis -> numbers of units worth having, ascending, at least one: multiples of `step` for wide axes, any number for
    others, as far as the model runs with them; and the full size.

    block: neurons go in multiples of it too, where there are more than that.
    """
    allowed = {}
    for axis in _axes(layout):
        whole = block if axis.kind == "ffn" and axis.size > block else 1
        unit = math.lcm(step if axis.size >= 8 * step else 1, whole, axis.multiple)
        allowed[axis.name] = np.unique(np.append(np.arange(unit, axis.size, unit), axis.size))
    return allowed


def rounded(cost: Cost, layout: Layout, multiple: int) -> Cost:
    """The cost with numbers of neurons that are multiples of `multiple` only, and the full numbers.

    Neurons are the width of a matrix as a runtime sees it. Heads and groups of heads are not rounded: the widths that
    they make are multiples of the size of a head already.
    """
    allowed = {
        name: counts[(counts % multiple == 0) | (counts == counts[-1])] if layout.axis(name).kind == "ffn" else counts
        for name, counts in cost.allowed.items()
    }
    return replace(cost, allowed=allowed)


def _axes(layout: Layout) -> list[Axis]:
    """The axes that costs are given for: those of a latency table."""
    return [layout.axis(name) for names in groups_of(layout).values() for name in names]
