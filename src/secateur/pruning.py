"""prune: layout -> stats -> scores -> plan, and the repair of the weights that stay."""

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
from secateur.fit import check_axes, check_pattern
from secateur.host import Host
from secateur.layout import Axis, Layout
from secateur.plan import Plan
from secateur.repair.walk import Repair, layer_of, repair_weights
from secateur.select import (
    NM,
    Block,
    Element,
    Pattern,
    Unit,
    check_budget,
    needed_budget,
    resolve_axes,
    select_units,
    select_weights,
)
from secateur.stats import OF_AXIS, OF_WEIGHT, Stats

Criterion = Callable[..., Array]

NOTICEABLE = 0.01
"""A linear weight of which this share is exactly zero was pruned: training leaves no zero, float16 one in a million.
Weights that were dequantised from few bits can reach it too; `host.plan = None` lets their zeros change.
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
    repair: a method of `secateur.repair`, which chooses single weights, N:M groups or blocks and changes the weights
        that stay, on the inputs that the dense model gives each layer; the plan then contains new weights. The method
        starts from the choice of the criterion where there is one.

    Raises PlanError for budgets and patterns that cannot be met, DataError when data is missing or gives NaN,
    ModelError when a weight is NaN or infinite.
    """
    budget = Uniform(float(budget)) if isinstance(budget, int | float) else budget
    if pattern is None or (criterion is None and repair is None):
        raise PlanError("prune needs a pattern, and a criterion or a repair")
    if not isinstance(pattern, Unit):
        return prune_weights(host, criterion, pattern, budget, data, stats=stats, weights=weights, repair=repair)
    if criterion is None or repair is not None:
        raise PlanError(f"repair prunes single weights, N:M groups or blocks, not {pattern}")
    return prune_units(host, criterion, pattern, budget, data, stats=stats)


def prune_units(
    host: Host,
    criterion: Criterion,
    pattern: Unit,
    budget: Budget | None,
    data: Iterable[Any] | None = None,
    *,
    stats: Stats | None = None,
) -> Plan:
    """`prune` for whole units of axes."""
    layout, budget = host.layout, needed_budget(pattern, budget)
    needs = needs_of(criterion)
    check_pattern(_name(criterion), needs, pattern)
    axes = resolve_axes(layout, pattern)
    check_axes(_name(criterion), _missing(needs, stats), layout, axes)
    check_weights(host)
    stats = _statistics(host, criterion, needs, data, stats, axes=[axis.name for axis in axes])
    scores = {axis.name: unit_scores(host, criterion, axis, stats) for axis in axes}
    costs = {axis.name: unit_parameters(layout, axis.name) for axis in axes}
    keep = select_units(layout, scores, costs, budget)
    multiples: dict[str, list[str]] = {}
    for axis in axes:
        if axis.multiple > 1:
            multiples.setdefault(str(axis.multiple), []).append(axis.name)
    counted = {"axes": len(axes), "units": sum(axis.size for axis in axes)}
    return Plan(keep, provenance=_provenance(criterion, None, pattern, budget, counted, multiples)).check(layout)


def prune_weights(
    host: Host,
    criterion: Criterion | None,
    pattern: Element | NM | Block,
    budget: Budget | None,
    data: Iterable[Any] | None = None,
    *,
    stats: Stats | None = None,
    weights: Sequence[str] | None = None,
    repair: Repair | None = None,
) -> Plan:
    """`prune` for single weights, N:M groups and blocks."""
    check_budget(pattern, budget)
    needs = needs_of(criterion) if criterion is not None else []
    check_pattern(_name(criterion), needs, pattern)
    check_weights(host)
    layout, names = host.layout, choose_weights(host.layout, weights)
    stats = _statistics(host, criterion, [*needs, "gram"] if repair is not None else needs, data, stats, weights=names)
    kinds = {name: (layer_of if isinstance(budget, OWL) else kind_of)(layout, name) for name in names}
    masks: dict[str, np.ndarray] = {}
    new: dict[str, np.ndarray] = {}
    if criterion is not None:
        scores = {name: weight_scores(host, criterion, name, stats) for name in names}
        in_dims = {name: layout.linears[name].contracted for name in names}
        masks = select_weights(scores, in_dims, pattern, budget, kinds)
    if repair is not None:
        masks, new = repair_weights(host, repair, names, pattern, budget, stats, kinds, start=masks or None)
    counted = {"tensors": len(names), "weights": sum(int(mask.size) for mask in masks.values())}
    provenance = _provenance(criterion, repair, pattern, budget, counted)
    return Plan(masks=masks, provenance=provenance, weights=new).check(layout)


def _statistics(
    host: Host,
    criterion: Criterion | None,
    needs: Sequence[str],
    data: Iterable[Any] | None,
    stats: Stats | None,
    *,
    axes: Sequence[str] | None = None,
    weights: Sequence[str] | None = None,
) -> Stats:
    """The quantities `needs`: those that `stats` lacks are collected from the data; DataError when there is none."""
    wanted = _missing(needs, stats)
    if not wanted:
        return stats or Stats()
    if data is None:
        who = f"criterion {_name(criterion)}" if criterion is not None else "repair"
        raise DataError(f"{who} needs {', '.join(wanted)}; pass data")
    collected = host.collect(wanted, data, axes, weights if "gram" in wanted else None)
    return collected.merge(stats) if stats else collected


def _missing(needs: Sequence[str], stats: Stats | None) -> list[str]:
    """The quantities that have to be collected."""
    return [need for need in needs if need != "weight" and not (stats and stats.sums.get(need))]


def _name(criterion: Criterion | None) -> str:
    return getattr(criterion, "__name__", str(criterion))


def _provenance(
    criterion: Criterion | None,
    repair: Repair | None,
    pattern: Pattern,
    budget: Budget | None,
    counted: Mapping[str, int],
    multiples: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """What explains a plan: see `Plan.provenance`. multiples: number -> axes that keep a multiple of it."""
    return {
        "criterion": criterion.__name__ if criterion is not None else None,
        **({"repair": getattr(repair, "__name__", str(repair))} if repair is not None else {}),
        "pattern": str(pattern),
        "budget": None if isinstance(pattern, NM) else repr(budget),
        "counted": counted,
        **({"multiples": multiples} if multiples else {}),
        "secateur": __version__,
    }


def earlier_zeros(weights: Mapping[str, Array]) -> Plan | None:
    """What was pruned before a model was opened: exact zeros of its linear weights as a plan; None for a dense model.

    Zeros count in all weights once one weight has a noticeable share of them (`NOTICEABLE`). A weight that is zero
    throughout is untrained (a new head, an adapter) and is left out.
    """
    counts = {}
    for name, weight in weights.items():
        count = int(to_numpy(weight == 0).sum())
        if 0 < count < int(np.prod(weight.shape, dtype=np.int64)):
            counts[name] = count
    if not any(n >= NOTICEABLE * np.prod(weights[name].shape, dtype=np.int64) for name, n in counts.items()):
        return None
    masks = {name: to_numpy(weights[name] != 0) for name in counts}
    totals = {"tensors": len(counts), "zeros": sum(counts.values())}
    provenance = {"criterion": "zeros found in the model", "pattern": "element", "found": totals}
    return Plan(masks=masks, provenance=provenance)


def check_weights(host: Host) -> None:
    """ModelError when a parameter is NaN or infinite, whether a criterion reads it or not."""
    for param in host.layout.params:
        if not all_finite(host.read(param)):
            raise ModelError(f"{param} holds NaN or infinite weights; repair the model before pruning it")


def needs_of(criterion: Criterion) -> list[str]:
    """The quantities that a criterion asks for: the names of its parameters without a default."""
    needs = [p.name for p in inspect.signature(criterion).parameters.values() if p.default is p.empty]
    known = {"weight", *OF_WEIGHT, *OF_AXIS}
    for need in needs:
        if need not in known:
            raise PlanError(f"criterion {_name(criterion)} asks for {need!r}; there is {', '.join(sorted(known))}")
    return needs


def default_weights(layout: Layout) -> list[str]:
    """The weights that are pruned when the user names none: linear weights inside the repeated layers.

    Where no layers repeat they are those of attention and feed-forward parts, and where there are none of these, all
    linear weights. Embeddings, norms, biases and task heads are never among them.
    """
    paths = [axis.path for axis in layout.axes.values() if axis.kind == "layer" and axis.path]
    inside = [name for name in layout.linears if any(name.startswith(f"{path}.") for path in paths)]
    if inside:
        return inside
    parts = [name for name in layout.linears if kind_of(layout, name) not in ("hidden", "dense", "vocab")]
    return parts or list(layout.linears)


def choose_weights(layout: Layout, patterns: Sequence[str] | None) -> list[str]:
    """The weights that the glob patterns name, or `default_weights`; PlanError when there is none."""
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
    """Kind of the first axis of a weight that is not the residual stream (`head`, `kv`, `ffn`, ...), else `hidden`."""
    for axis in layout.axes.values():
        if axis.kind != "hidden" and layout.carries(param, axis.name):
            return axis.kind
    return "hidden"


def weight_scores(host: Host, criterion: Criterion, param: str, stats: Stats) -> np.ndarray:
    """Contribution of each weight of one parameter, in its shape."""
    return to_numpy(criterion(**{need: _weight_argument(host, param, need, stats) for need in needs_of(criterion)}))


def _weight_argument(host: Host, param: str, need: str, stats: Stats) -> Array:
    """The argument `need` of a criterion for one parameter, in float32 or better."""
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
    members = [p for p in host.layout.members(axis.name) if all(n == "weight" or stats.has(n, p) for n in needs)]
    if not members:
        wanted = ", ".join(need for need in needs if need != "weight")
        raise DataError(f"no {wanted} was collected for the weights of {axis.name}; use magnitude or taylor there")
    for param in members:
        contribution = criterion(**{need: _weight_argument(host, param, need, stats) for need in needs})
        total += host.layout.reduce(param, contribution, axis.name)
    return np.abs(total)


def _axis_mean(layout: Layout, axis: Axis, need: str, stats: Stats) -> np.ndarray:
    """The argument `need` of a criterion for the units of an axis, (units,)."""
    if stats.has(need, axis.name):
        return np.asarray(stats.mean(need, axis.name))
    for whole in layout.axes.values():  # a group of query heads counts as the sum of its heads
        if whole.parts[:1] == (axis.name,) and stats.has(need, whole.name):
            return np.asarray(stats.mean(need, whole.name)).reshape(axis.size, -1).sum(1)
    raise DataError(f"no {need} was collected for {axis.name}; this criterion does not fit axes of kind {axis.kind!r}")
