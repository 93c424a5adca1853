"""Units and single zeros together: candidates that meet a latency on our sparse kernels.

Each share of the time goes to units first; the zeros of the weights that are left then have more time to themselves.
Which share is best, the true divergence says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.arrays import Array
from secateur.cost import unit_parameters
from secateur.errors import PlanError
from secateur.host import Host
from secateur.plan import Plan
from secateur.repair import alps, sparsegpt
from secateur.search.build import RIDGES, plan_of
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import choose, expected
from secateur.search.choosing.trial import Trial
from secateur.search.costs import Cost
from secateur.search.levels import Levels
from secateur.search.sparse.densities import Losses, choose_densities, density_losses, with_zeros
from secateur.search.sparse.times import SparseTimes
from secateur.search.target import Limit
from secateur.stats import Stats
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost

SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7)
"""Shares of the latency that units give up for denser weights."""
PATIENCE = 2
"""Shares without a lower divergence after which larger ones are not tried."""


@dataclass(frozen=True)
class Mixed:
    """A candidate within the latency. loss: expected divergence. share: of the latency that units gave up."""

    candidate: Candidate
    loss: float
    share: float


def choose_mixed(
    host: TorchHost,
    task: Task,
    batches: Batches,
    levels: Levels,
    stats: Stats,
    times: SparseTimes,
    bound_ms: float,
    *,
    ridge: float = RIDGES[0],
    reference: Reference | None = None,
    cache: Losses | None = None,
) -> tuple[Mixed, Mapping[float, float]]:
    """The units and densities of least true divergence that are expected to take `bound_ms`, and what was tried.

    batches: the search rows. reference: the dense model on them, if it has run. cache: see `density_losses`.
    Candidates are repaired by SparseGPT, which is quick; `mixed_plan` makes the plan of the best with a better repair.

    Raises PlanError when no units and zeros take so little time.
    """

    def tried(candidate: Candidate) -> Plan:
        return mixed_plan(host, levels, stats, candidate, ridge, sparsegpt)

    trial = Trial(host, task, batches, tried, reference=reference)
    found = mixed_candidates(host, levels, stats, times, bound_ms, ridge=ridge, cache=cache)
    return best_mixed(found, trial.divergence)


def mixed_candidates(
    host: Host,
    levels: Levels,
    stats: Stats,
    times: SparseTimes,
    bound_ms: float,
    *,
    ridge: float = RIDGES[0],
    shares: Sequence[float] = SHARES,
    cache: Losses | None = None,
) -> Iterator[Mixed]:
    """Candidates that are expected to take `bound_ms`: units for each share, and the best densities beside them.

    cache: see `density_losses`. Shares that leave too little are left out. Raises PlanError when no share can be had.
    """
    cache = {} if cache is None else cache
    reason = ""
    found = False
    for share in shares:
        try:
            units = _units(host, levels, times, bound_ms, share)
            plan = plan_of(host, levels, stats, units, ridge)
            losses = density_losses(host, stats, plan, cache)
            densities = choose_densities(losses, times.room(host.layout, plan, bound_ms))
        except PlanError as error:
            reason = str(error)
            continue
        loss = expected(levels, units) + losses.total(densities)
        found = True
        yield Mixed(Candidate(units.kept, densities=densities), loss, share)
    if not found:
        raise PlanError(f"no units and zeros take {bound_ms:.4g} ms: {reason}")


def mixed_plan(
    host: Host,
    levels: Levels,
    stats: Stats,
    candidate: Candidate,
    ridge: float = RIDGES[0],
    method: Callable[..., Array] = alps,
) -> Plan:
    """`plan_of` for a candidate with densities: masks and repaired weights beside what makes up for units."""
    return with_zeros(host, stats, plan_of(host, levels, stats, candidate, ridge), candidate.densities, method)


def _units(host: Host, levels: Levels, times: SparseTimes, bound_ms: float, share: float) -> Candidate:
    """The units of least expected divergence that take `share` of the latency at the even density that meets it."""
    if not share:
        return Candidate()
    layout = host.layout
    whole = Plan()
    room = times.room(layout, whole, bound_ms)
    density = room / times.room(layout, whole, times.of(layout, whole, {}))
    curves, allowed = {}, {}
    for name, axis in levels.axes.items():
        if name in times.per_unit:
            saved = times.per_unit[name] + times.per_weight * density * unit_parameters(layout, name)
            curves[name] = -max(saved, 0.0) / bound_ms * (axis.size - np.arange(axis.size + 1.0))
            allowed[name] = np.arange(1, axis.size + 1)
    cost = Cost(Limit("latency", 1.0 - share), bound_ms, curves, allowed)
    return choose(levels, [cost])


def best_mixed(
    candidates: Iterable[Mixed], divergence: Callable[[Candidate], float]
) -> tuple[Mixed, Mapping[float, float]]:
    """The candidate of least true divergence, and the divergence at each share that was tried."""
    seen: dict[float, float] = {}
    best: Mixed | None = None
    worse = 0
    for one in candidates:
        seen[one.share] = divergence(one.candidate)
        if best is None or seen[one.share] < seen[best.share]:
            best, worse = one, 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    if best is None:
        raise PlanError("there is no candidate to choose from")
    return best, seen
