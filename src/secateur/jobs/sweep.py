"""Choose a threshold: try several budgets of one criterion on a dense model and score each, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.arrays import to_numpy
from secateur.budget import Budget
from secateur.jobs.prune_model import Data, calibration_of
from secateur.metrics.evaluation import Evaluation
from secateur.plan import Plan
from secateur.pruning import Criterion, check_weights, needs_of, prune, weight_scores
from secateur.records.outcome import removed_share
from secateur.select import Pattern, Unit, resolve_axes
from secateur.stats import Stats
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.torch.host import TorchHost


@dataclass(frozen=True)
class Point:
    """The result of one budget.

    sparsity: share of the counted weights or units that is removed.
    threshold: the largest score that is removed; None for units, and where nothing is removed.
    score: evaluation of the pruned model.
    """

    sparsity: float
    threshold: float | None
    score: Evaluation

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"sparsity": self.sparsity, "threshold": self.threshold, **self.score.as_json()}


def sweep(
    host: TorchHost,
    criterion: Criterion,
    pattern: Pattern,
    budgets: Sequence[Budget],
    data: Data,
    track: Track = silent,
) -> list[Point]:
    """Score the dense model, then every budget; statistics are collected once. `host` is unchanged afterwards."""
    check_weights(host)
    stats = Stats()
    needs = [need for need in needs_of(criterion) if need != "weight"]
    if needs:
        axes = [a.name for a in resolve_axes(host.layout, pattern)] if isinstance(pattern, Unit) else None
        stats = host.collect(needs, track(calibration_of(host, data), f"collect {', '.join(needs)}"), axes)
    reference = Reference(data.task, host.model, data.test, track)
    points = [Point(0.0, None, reference.evaluation())]
    for budget in budgets:
        plan = prune(host, criterion, pattern, budget, stats=stats)
        with host.masked(plan):
            found = evaluate(data.task, host.model, data.test, reference, track)
        points.append(Point(removed_share(host.layout, plan), cut(host, criterion, plan, stats), found))
    return points


def cut(host: TorchHost, criterion: Criterion, plan: Plan, stats: Stats) -> float | None:
    """Largest |weight score| among the removed weights; None for units, and where nothing is removed."""
    largest = [
        float(np.abs(to_numpy(weight_scores(host, criterion, name, stats)))[~mask].max())
        for name, mask in plan.masks.items()
        if not mask.all()
    ]
    return max(largest) if largest else None
