"""A candidate as a plan: which units stay, and the weights that make up for the others."""

from collections.abc import MutableMapping

import numpy as np

from secateur.arrays import to_numpy
from secateur.host import Host
from secateur.plan import Plan
from secateur.repair.structured import refit
from secateur.search.candidate import Candidate
from secateur.search.levels import AxisLevels, Levels
from secateur.stats import Stats

RIDGES = (0.01, 0.1, 1.0)
"""Ridges that are tried; 0.01 was best on a small encoder, 1 on a small language model."""

Cache = MutableMapping[tuple[str, str, int, float], dict[str, np.ndarray]]
"""(method, axis, size, ridge) -> the weights of that size, in float32."""


def plan_of(
    host: Host,
    levels: Levels,
    stats: Stats,
    candidate: Candidate,
    ridge: float = RIDGES[0],
    *,
    compensate: bool = True,
    cache: Cache | None = None,
) -> Plan:
    """The plan of a candidate: kept units, layers that go, and for each smaller axis the weight refitted to it.

    The weights have their full shapes, with zeros where units go, and belong to the dense model `host`.

    ridge: of the refit, in units of the mean diagonal of A, see `secateur.repair.structured.refit`.
    compensate: whether weights make up for the units that go.
    cache: keeps refitted weights, for candidates that share sizes.

    Raises PlanError for sizes that the layout refuses.
    """
    layout = host.layout
    keep: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}
    for name, gone in candidate.dropped.items():
        if gone:
            keep[name] = np.setdiff1d(np.arange(layout.axis(name).size), np.asarray(gone))
    for name, count in candidate.kept.items():
        axis = levels.axes[name]
        if count == axis.size:
            continue
        keep[name] = axis.kept(count) if count else axis.order[:0]
        if compensate and axis.weight is not None and count:
            weights |= _refitted(host, axis, stats, count, ridge, levels.method, {} if cache is None else cache)
    provenance = {"method": levels.method, "ridge": ridge if weights else None, "pattern": "unit"}
    return Plan(keep, provenance=provenance, weights=weights).check(layout)


def _refitted(
    host: Host, axis: AxisLevels, stats: Stats, count: int, ridge: float, method: str, cache: Cache
) -> dict[str, np.ndarray]:
    """The weight behind an axis, and its bias, when `count` units stay."""
    key = (method, axis.axis, count, ridge)
    if key not in cache:
        assert axis.weight is not None
        in_dim = host.layout.linears[axis.weight].in_dim
        owner = host.layout.owners(axis.weight, axis.axis)[in_dim]
        assert owner is not None
        matrix = to_numpy(host.read(axis.weight))
        mean = None if axis.bias is None else to_numpy(stats.mean("fisher_mean", axis.weight))
        bias = None if axis.bias is None else to_numpy(host.read(axis.bias))
        inputs = to_numpy(stats.mean("fisher_in", axis.weight))
        alive = np.isin(owner, axis.kept(count)) | (owner < 0)
        new, new_bias = refit(matrix if in_dim else matrix.T, inputs, alive, ridge, mean, bias)
        made = {axis.weight: np.ascontiguousarray(new if in_dim else new.T, dtype=np.float32)}
        if axis.bias is not None and new_bias is not None:
            made[axis.bias] = new_bias.astype(np.float32)
        cache[key] = made
    return cache[key]
