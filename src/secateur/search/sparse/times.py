"""Times of a model on our sparse kernels, by its units and by how many single weights stay.

In blocks that run as one call the time is nearly a constant, an amount for each unit (attention costs by the head), and
an amount for each single weight that stays, whatever its place. A few whole models of random zeros show these amounts:
layers timed alone pay for packing their inputs, which a block does once. Neighbouring blocks with unlike numbers of
heads run as calls of their own, which costs time at each such break.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from secateur.deploy.jobs.latency_table import groups_of, key_of
from secateur.deploy.jobs.timing import Say
from secateur.deploy.target import DeployError
from secateur.files import write_json
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.runtime.compile_model import compile
from secateur.runtime.layers.tuning import cache_file
from secateur.schemas import reading
from secateur.schemas.results import SparseTable
from secateur.search.sparse.densities import kept_weights
from secateur.torch.host import TorchHost
from secateur.torch.stats.linear_inputs import rows_read

EVEN = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Densities at which the whole model is timed."""
AT_HALF = 0.2
"""Density at which the units of one group are halved."""
BOTH = (0.4, 0.1)
"""Densities at which the units of all groups are halved."""


Build = Callable[[Plan], Callable[[], object]]
"""Makes the call of the model that a plan leaves, on inputs of the shape that is asked for."""


@dataclass(frozen=True)
class SparseTimes:
    """Milliseconds of the compiled model: fixed + sum over axes of units x per_unit + breaks x per_break +
    single weights x per_weight.

    dense_ms: of the dense model in torch.
    per_unit: axis -> milliseconds of one unit that stays, its weights apart.
    per_break: milliseconds where the heads of two neighbouring blocks differ in number.
    names: the linear weights whose zeros count.
    error: the largest relative difference to what was measured, over the models measured.
    """

    dense_ms: float
    fixed: float
    per_unit: Mapping[str, float]
    per_break: float
    per_weight: float
    names: tuple[str, ...]
    error: float

    def of(self, layout: Layout, plan: Plan, densities: Mapping[str, float]) -> float:
        """Milliseconds of a plan's units with certain densities."""
        return self._of_units(layout, plan) + self.per_weight * kept_weights(layout, self.names, plan, densities)

    def room(self, layout: Layout, plan: Plan, bound_ms: float) -> float:
        """How many single weights may stay beside the units of a plan, within `bound_ms`."""
        return (bound_ms - self._of_units(layout, plan)) / self.per_weight

    def corrected(self, factor: float) -> "SparseTimes":
        """All times multiplied, after a measurement."""
        per_unit = {axis: ms * factor for axis, ms in self.per_unit.items()}
        fixed, per_break, per_weight = (factor * ms for ms in (self.fixed, self.per_break, self.per_weight))
        return replace(self, fixed=fixed, per_unit=per_unit, per_break=per_break, per_weight=per_weight)

    def _of_units(self, layout: Layout, plan: Plan) -> float:
        units = {axis: len(plan.keep.get(axis, range(layout.axis(axis).size))) for axis in self.per_unit}
        broken = self.per_break * breaks(layout, plan)
        return self.fixed + broken + sum(self.per_unit[axis] * count for axis, count in units.items())


def breaks(layout: Layout, plan: Plan) -> int:
    """How often the heads of two neighbouring blocks differ in number."""
    heads = [axes for axes in groups_of(layout).values() if layout.axis(axes[0]).kind in ("head", "kv")]
    counts = [[len(plan.keep.get(axis, range(layout.axis(axis).size))) for axis in axes] for axes in heads]
    return sum(a != b for of_group in counts for a, b in pairwise(of_group))


def sparse_times(
    layout: Layout, names: Sequence[str], build: Build, dense: Callable[[], object], *, turns: int = 25
) -> SparseTimes:
    """Time models of random zeros in turn with the dense one, on torch's present number of threads.

    names: the linear weights that get zeros. build: makes the call of a plan, as `on_kernels` does. dense: the call of
    the dense model. turns: calls of each model; the lower quartile counts.
    """
    groups = groups_of(layout)
    rows: list[list[float]] = []
    calls = [dense]
    for seed, (density, sizes) in enumerate(_tried(layout, groups)):
        rng, shapes = np.random.default_rng(seed), {name: layout.shape(name) for name in names}
        masks = {name: rng.random(shape, np.float32) < density for name, shape in shapes.items()}
        plan = Plan({axis: np.arange(size) for axis, size in sizes.items()}, masks).check(layout)
        calls.append(build(plan))
        units = [sum(sizes.get(axis, layout.axis(axis).size) for axis in axes) for axes in groups.values()]
        weights = kept_weights(layout, names, plan, dict.fromkeys(names, density))
        rows.append([1.0, *units, breaks(layout, plan), weights])
    dense_ms, *took = in_turns(calls, turns)
    factors = np.array(rows) / np.array(took)[:, None]  # relative errors count
    scale = np.maximum(np.abs(factors).max(0), 1e-30)
    found = np.linalg.lstsq(factors / scale, np.ones(len(took)), rcond=None)[0] / scale
    per_unit = {axis: float(ms) for axes, ms in zip(groups.values(), found[1:-2], strict=True) for axis in axes}
    error = float(np.abs(factors @ found - 1).max())
    return SparseTimes(dense_ms, float(found[0]), per_unit, float(found[-2]), float(found[-1]), tuple(names), error)


def _tried(layout: Layout, groups: Mapping[str, Sequence[str]]) -> list[tuple[float, dict[str, int]]]:
    """Densities and sizes of the models that are timed: whole, halved by group and in all, and unlike by turns."""
    half = {axis: layout.axis(axis).size // 2 for axes in groups.values() for axis in axes}
    found: list[tuple[float, dict[str, int]]] = [(density, {}) for density in EVEN]
    found += [(AT_HALF, {axis: half[axis] for axis in axes}) for axes in groups.values()]
    found += [(density, half) for density in BOTH]
    unlike = {axis: half[axis] + number % 2 for axes in groups.values() for number, axis in enumerate(axes)}
    return [*found, *((density, unlike) for density in BOTH)]


def kernel_times(
    host: TorchHost, example: Mapping[str, Any], *, turns: int = 25, cache: bool = True, say: Say = lambda text: None
) -> SparseTimes:
    """`sparse_times` on our compiled layers, for zeros in the weights that are pruned by default.

    example: a batch of the shape that is asked for. cache: keep the times by machine, layout, shape and threads, and
    take them from there the next time. say: gets a line of text for each step.

    Raises DeployError when no block of a model runs as one call.
    """
    names = default_weights(host.layout)
    shapes = {name: list(value.shape) for name, value in example.items()}
    key = key_of(host.layout, "sparse", names, shapes, torch.get_num_threads())
    file = cache_file().parent / f"sparse-{key}.json"
    if cache and file.is_file():
        try:
            found = reading.read(file, SparseTable, error=DeployError, remedy="measuring again").model_dump()
            return SparseTimes(**{**found, "names": tuple(found["names"])})
        except DeployError as error:
            say(str(error))
    say("times on the sparse kernels")
    build = on_kernels(host, example, rows_read(host.model, example))
    times = sparse_times(host.layout, names, build, partial(host.model, **example), turns=turns)
    if cache:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(times))
    return times


def on_kernels(host: TorchHost, example: Mapping[str, Any], tokens: int) -> Build:
    """Builds calls of plans on our compiled layers. example: a batch of the shape asked for. tokens: in it.

    The build raises DeployError when no block of a model runs as one call.
    """

    def build(plan: Plan) -> Callable[[], object]:
        return partial(compiled(host, plan, example, tokens), **example)

    return build


def compiled(host: TorchHost, plan: Plan, example: Mapping[str, Any], tokens: int) -> torch.nn.Module:
    """The model of a plan on our compiled layers; see `on_kernels`."""
    cut = host.copy()
    cut.resize(plan)
    fast = compile(cut.model, tokens=tokens, measure=False, example=example)
    report: Any = fast.secateur_report
    if not report.blocks:
        raise DeployError(f"no block of the model runs on the sparse kernels as one call: {report.summary()}")
    return fast


def in_turns(calls: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """Milliseconds of each call, the lower quartile of its turns.

    On one thread the time of the processor counts, which other programs on the machine disturb less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = np.empty((turns, len(calls)))
    with torch.inference_mode():
        for call in calls:
            call()
        for turn in samples:
            for i, call in enumerate(calls):
                start = clock()
                call()
                turn[i] = clock() - start
    return [float(ms) for ms in 1e3 * np.quantile(samples, 0.25, axis=0)]
