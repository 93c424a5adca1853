"""The one walk: layout -> stats -> scores -> plan -> repair."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from secateur._version import __version__
from secateur.arrays import Array, all_finite, single, to_numpy
from secateur.budget import OWL, Budget, Uniform
from secateur.cost import unit_parameters
from secateur.errors import DataError, ModelError, PlanError
from secateur.host import Host
from secateur.layout import Axis, Layout
from secateur.plan import Plan
from secateur.repair.walk import Repair, layer_of, repair_weights
from secateur.select import NM, Pattern, Unit, check_budget, resolve_axes, select_units, select_weights
from secateur.stats import OF_AXIS, OF_WEIGHT, Stats

Criterion = Callable[..., Array]

NOTICEABLE = 0.01
"""A linear weight of which this share is exactly zero was pruned: training leaves none, float16 one in a million.
Weights dequantised from few bits can pass it, too; whoever wants those to move sets `host.plan = None`.
"""


def prune(
    host: Host,
    criterion: Criterion | None = None,
    pattern: Pattern | None = None,
    budget: Budget | float | None = None,
    data: Iterable[Any] | None = None,
    *,
    stats: Stats | None = None,
    weights: Sequence[str] | None = None,
    repair: Repair | None = None,
) -> Plan:
    """Decide what stays. Nothing in the model changes.

    criterion: a function of arrays, see `secateur.criteria`; may be left out with `repair`.
    budget: a budget, or a sparsity in [0, 1) meant uniformly; None for N:M, which is its own budget.
    data: batches, needed when the criterion asks for more than weights and `stats` does not hold it.
    weights: names or glob patterns of the weights that element, N:M and block patterns may touch
        (default: `default_weights`).
    repair: a method of `secateur.repair`, which chooses single weights, N:M groups or blocks and mends what stays, on
        the inputs that the dense model gives each layer; the plan then holds new weights. With a criterion too, its
        choice is what the method starts from.

    Raises PlanError for budgets and patterns that cannot be met, DataError when data is missing or gives NaN,
    ModelError when a weight is NaN or infinite.
    """
    budget = Uniform(float(budget)) if isinstance(budget, int | float) else budget
    layout = host.layout
    if pattern is None or (criterion is None and repair is None):
        raise PlanError("prune needs a pattern, and a criterion or a repair")
    if repair is not None and isinstance(pattern, Unit):
        raise PlanError(f"repair prunes single weights, N:M groups or blocks, not {pattern}")
    check_budget(pattern, budget)
    needs = needs_of(criterion) if criterion is not None else []
    check_weights(host)
    axes = resolve_axes(layout, pattern) if isinstance(pattern, Unit) else []
    names = [] if axes else choose_weights(layout, weights)
    asked = [*needs, "gram"] if repair is not None else needs
    wanted = [need for need in asked if need != "weight" and not (stats and stats.sums.get(need))]
    if wanted:
        if data is None:
            who = f"criterion {criterion.__name__}" if criterion is not None else "repair"
            raise DataError(f"{who} needs {', '.join(wanted)}; pass data")
        of_grams = {"weights": names} if "gram" in wanted else {}
        collected = host.collect(wanted, data, [axis.name for axis in axes] if axes else None, **of_grams)
        stats = collected.merge(stats) if stats else collected
    stats = stats or Stats()
    multiples: dict[str, list[str]] = {}
    if axes:
        assert criterion is not None
        assert budget is not None
        scores = {axis.name: unit_scores(host, criterion, axis, stats) for axis in axes}
        costs = {axis.name: unit_parameters(layout, axis.name) for axis in axes}
        plan = Plan(keep=select_units(layout, scores, costs, budget))
        counted = {"axes": len(axes), "units": sum(axis.size for axis in axes)}
        for axis in axes:
            if axis.multiple > 1:
                multiples.setdefault(str(axis.multiple), []).append(axis.name)
    else:
        assert not isinstance(pattern, Unit)
        kinds = {name: (layer_of if isinstance(budget, OWL) else kind_of)(layout, name) for name in names}
        masks: dict[str, np.ndarray] | None = None
        new: dict[str, np.ndarray] = {}
        if criterion is not None:
            scores = {name: weight_scores(host, criterion, name, stats) for name in names}
            in_dims = {name: layout.linears[name].contracted for name in names}
            masks = select_weights(scores, in_dims, pattern, budget, kinds)
        if repair is not None:
            masks, new = repair_weights(host, repair, names, pattern, budget, stats, kinds, start=masks)
        assert masks is not None
        plan = Plan(masks=masks, weights=new)
        counted = {"tensors": len(names), "weights": sum(int(mask.size) for mask in masks.values())}
    provenance = {
        "criterion": criterion.__name__ if criterion is not None else None,
        **({"repair": getattr(repair, "__name__", str(repair))} if repair is not None else {}),
        "pattern": str(pattern),
        "budget": None if isinstance(pattern, NM) else repr(budget),
        "counted": counted,
        **({"multiples": multiples} if multiples else {}),
        "secateur": __version__,
    }
    return Plan(plan.keep, plan.masks, {}, provenance, plan.weights).check(layout)


def earlier_zeros(weights: Mapping[str, Array]) -> Plan | None:
    """What was pruned before a model was opened: the exact zeros of its linear weights as a plan; None for a dense one.

    They count once any weight has a noticeable share of them (`NOTICEABLE`), then in all weights. A weight that is zero
    throughout is one that begins there (a fresh head, an adapter), and is left free.
    """
    counts = {}
    for name, weight in weights.items():
        count = int(to_numpy(weight == 0).sum())
        if 0 < count < int(np.prod(weight.shape, dtype=np.int64)):
            counts[name] = count
    if not any(n >= NOTICEABLE * np.prod(weights[name].shape, dtype=np.int64) for name, n in counts.items()):
        return None
    masks = {name: to_numpy(weights[name] != 0) for name in counts}
    found = {"tensors": len(counts), "zeros": sum(counts.values())}
    return Plan(masks=masks, provenance={"criterion": "zeros found in the model", "pattern": "element", "found": found})


def check_weights(host: Host) -> None:
    """ModelError when a parameter, whatever the criterion looks at, is NaN or infinite."""
    for param in host.layout.params:
        if not all_finite(host.read(param)):
            raise ModelError(f"{param} holds NaN or infinite weights; repair the model before pruning it")


def needs_of(criterion: Criterion) -> list[str]:
    """What a criterion asks for: the names of its parameters without a default."""
    needs = [p.name for p in inspect.signature(criterion).parameters.values() if p.default is p.empty]
    known = {"weight", *OF_WEIGHT, *OF_AXIS}
    for need in needs:
        if need not in known:
            name = getattr(criterion, "__name__", criterion)
            raise PlanError(f"criterion {name} asks for {need!r}; there is {', '.join(sorted(known))}")
    return needs


def default_weights(layout: Layout) -> list[str]:
    """The weights that count when the user names none: linear weights inside the repeated layers; where no layers
    repeat, those of attention and feed-forward parts; where there are none of these, all linear weights. Embeddings,
    norms, biases and task heads do not count.
    """
    paths = [axis.path for axis in layout.axes.values() if axis.kind == "layer" and axis.path]
    inside = [name for name in layout.linears if any(name.startswith(f"{path}.") for path in paths)]
    if inside:
        return inside
    parts = [name for name in layout.linears if kind_of(layout, name) not in ("hidden", "dense", "vocab")]
    return parts or list(layout.linears)


def choose_weights(layout: Layout, patterns: Sequence[str] | None) -> list[str]:
    """The weights that the glob patterns name, or the default ones; PlanError when there is none."""
    if patterns is None:
        names = default_weights(layout)
    else:
        names = [name for name in layout.linears if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if not names:
            raise PlanError(f"no linear weight matches {', '.join(patterns)}; see `secateur inspect`")
    if not names:
        raise PlanError("the model has no linear weight that could be pruned")
    return names


def kind_of(layout: Layout, param: str) -> str:
    """Kind of the first axis of a weight that is not the residual stream: `head`, `kv`, `ffn`, ..."""
    for axis in layout.axes.values():
        if axis.kind != "hidden" and layout.carries(param, axis.name):
            return axis.kind
    return "hidden"


def weight_scores(host: Host, criterion: Criterion, param: str, stats: Stats) -> np.ndarray:
    """Contribution of each weight of one parameter, in its shape."""
    arguments = {}
    for need in needs_of(criterion):
        if need in OF_AXIS:
            raise PlanError(
                f"criterion {criterion.__name__} scores units, not weights; use a pattern such as head or ffn"
            )
        arguments[need] = _weight_argument(host, param, need, stats)
    return to_numpy(criterion(**arguments))


def _weight_argument(host: Host, param: str, need: str, stats: Stats) -> Array:
    """What a criterion is given of one parameter, in float32 or better."""
    if need == "weight":
        return single(host.read(param))
    value = stats.mean(need, param)
    if not all_finite(value):
        raise DataError(f"{need} of {param} is NaN or infinite on this data; check the labels and the learning state")
    if need == "act_sq":
        inputs = host.layout.linears[param].contracted
        shape = [n if d in inputs else 1 for d, n in enumerate(host.layout.shape(param))]
        value = value.reshape(shape)
    return single(value)


def unit_scores(host: Host, criterion: Criterion, axis: Axis, stats: Stats) -> np.ndarray:
    """Score of each unit of an axis, float64 of shape (units,)."""
    needs = needs_of(criterion)
    if any(need in OF_AXIS for need in needs):
        scores = to_numpy(criterion(**{need: _axis_mean(host.layout, axis, need, stats) for need in needs}))
        if not np.isfinite(scores).all():
            raise DataError(f"criterion {criterion.__name__} gave NaN for {axis.name} on this data")
        return scores.astype(np.float64)
    total = np.zeros(axis.size)
    for param in host.layout.members(axis.name):
        if all(need == "weight" or stats.has(need, param) for need in needs):
            contribution = criterion(**{need: _weight_argument(host, param, need, stats) for need in needs})
            total += host.layout.reduce(param, contribution, axis.name)
    return np.abs(total)


def _axis_mean(layout: Layout, axis: Axis, need: str, stats: Stats) -> np.ndarray:
    if stats.has(need, axis.name):
        return np.asarray(stats.mean(need, axis.name))
    for whole in layout.axes.values():  # a group of query heads counts as the sum of its heads
        if whole.parts[:1] == (axis.name,) and stats.has(need, whole.name):
            return np.asarray(stats.mean(need, whole.name)).reshape(axis.size, -1).sum(1)
    raise DataError(f"no {need} was collected for {axis.name}; this criterion does not fit axes of kind {axis.kind!r}")
