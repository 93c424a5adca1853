"""Budgets: who gives how much. A budget turns scores into the number of entries (weights, blocks, units) that each
tensor or axis keeps; which ones they are, `secateur.select` decides by rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from secateur.errors import PlanError


@dataclass(frozen=True)
class Uniform:
    """The same share of every tensor or axis goes."""

    sparsity: float


@dataclass(frozen=True)
class Global:
    """The lowest scores of all go, wherever they are, until `sparsity` of the total cost is gone."""

    sparsity: float


@dataclass(frozen=True)
class PerKind:
    """Ranks within each kind (all FFN neurons of the model, all heads) so that unlike things are never compared
    (Fang et al., 2024, call it isomorphic). `sparsity` is one number, or one for each kind; kinds left out stay.
    """

    sparsity: float | Mapping[str, float]


@dataclass(frozen=True)
class Threshold:
    """Everything that scores `tau` or less goes."""

    tau: float


Budget: TypeAlias = Uniform | Global | PerKind | Threshold


@dataclass(frozen=True)
class Entries:
    """What is ranked of one tensor or axis: scores of shape (entries,), the cost of one entry, and its kind.

    floor: how many entries must stay (1 for axes, 0 for weights).
    """

    scores: np.ndarray
    kind: str = ""
    cost: float = 1.0
    floor: int = 0


def check_sparsity(sparsity: float) -> float:
    """Return it as a float; PlanError unless 0 <= sparsity < 1."""
    if not 0.0 <= float(sparsity) < 1.0:
        raise PlanError(f"sparsity {sparsity} is outside [0, 1); 0.5 removes half")
    return float(sparsity)


def allocate(budget: Budget, entries: Mapping[str, Entries]) -> dict[str, int]:
    """How many entries each tensor or axis keeps.

    Raises PlanError for a sparsity outside [0, 1), and for a threshold that would empty a tensor or axis.
    """
    if isinstance(budget, Uniform):
        sparsity = check_sparsity(budget.sparsity)
        return {key: _keep_share(len(e.scores), sparsity, e.floor) for key, e in entries.items()}
    if isinstance(budget, Global):
        return _lowest(entries, check_sparsity(budget.sparsity))
    if isinstance(budget, Threshold):
        return {key: _above(key, e.scores, budget.tau) for key, e in entries.items()}
    kinds = dict.fromkeys(e.kind for e in entries.values())
    if isinstance(budget.sparsity, Mapping):
        unknown = set(budget.sparsity) - set(kinds)
        if unknown:
            raise PlanError(f"no kind {sorted(unknown)[0]!r} among what is pruned; there is {', '.join(kinds)}")
    kept: dict[str, int] = {}
    for kind in kinds:
        share = budget.sparsity.get(kind, 0.0) if isinstance(budget.sparsity, Mapping) else budget.sparsity
        kept |= _lowest({key: e for key, e in entries.items() if e.kind == kind}, check_sparsity(share))
    return kept


def _keep_share(count: int, sparsity: float, floor: int) -> int:
    return max(count - round(count * sparsity), min(floor, count))


def _above(key: str, scores: np.ndarray, tau: float) -> int:
    kept = int((scores > tau).sum())
    if kept == 0:
        raise PlanError(
            f"threshold {tau:g} would empty {key}, whose largest score is {scores.max():.4g}; lower the threshold"
        )
    return kept


def _lowest(entries: Mapping[str, Entries], sparsity: float) -> dict[str, int]:
    """Cut from the bottom of one common ranking (score per cost) until the cost is met, never past a floor."""
    if all(e.floor == 0 and e.cost == 1.0 for e in entries.values()):
        return _lowest_of_equals(entries, sparsity)
    keys, rank, cost, bound = [], [], [], 0.0
    for key, e in entries.items():
        bound += len(e.scores) * e.cost
        lowest = np.sort(e.scores)[: max(len(e.scores) - e.floor, 0)]
        keys += [key] * len(lowest)
        rank.append(lowest / e.cost)
        cost.append(np.full(len(lowest), e.cost))
    order = np.argsort(np.concatenate(rank), kind="stable")
    cut = np.concatenate(cost)[order].cumsum() <= bound * sparsity * (1 + 1e-12)
    kept = {key: len(e.scores) for key, e in entries.items()}
    for position in order[cut]:
        kept[keys[position]] -= 1
    return kept


def _lowest_of_equals(entries: Mapping[str, Entries], sparsity: float) -> dict[str, int]:
    """The same for entries of equal cost, by one partition instead of a sort: weights come in millions."""
    total = sum(len(e.scores) for e in entries.values())
    count = round(total * sparsity)
    if count == 0:
        return {key: len(e.scores) for key, e in entries.items()}
    flat = np.concatenate([e.scores for e in entries.values()])
    last = np.partition(flat, count - 1)[count - 1]
    ties = count - int((flat < last).sum())
    kept = {}
    for key, e in entries.items():
        here = min(ties, int((e.scores == last).sum()))
        ties -= here
        kept[key] = len(e.scores) - int((e.scores < last).sum()) - here
    return kept
