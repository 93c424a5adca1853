"""Budgets: how much each tensor or axis loses. A budget turns scores into the number of entries (weights, blocks,
units) that each tensor or axis keeps; `secateur.select` chooses by rank which entries these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from secateur.errors import PlanError


@dataclass(frozen=True)
class Uniform:
    """Every tensor or axis loses the same share of its entries."""

    sparsity: float


@dataclass(frozen=True)
class Global:
    """The lowest scores of all tensors or axes are removed, until `sparsity` of the total cost is gone."""

    sparsity: float


@dataclass(frozen=True)
class PerKind:
    """Ranks within each kind (all FFN neurons of the model, all heads), so that scores of different kinds are never
    compared (Fang et al., 2024, call it isomorphic).

    sparsity: one number, or one for each kind; kinds without a number keep everything.
    """

    sparsity: float | Mapping[str, float]


@dataclass(frozen=True)
class Threshold:
    """Every entry that scores `tau` or less is removed."""

    tau: float


@dataclass(frozen=True)
class OWL:
    """Layers with many outlying scores keep more (Yin et al., 2024): see `owl`. For single weights and blocks.

    A layer is all entries of one kind. A score is an outlier when it is above `multiple` times the mean of its layer;
    densities differ by at most 2 `spread`.
    """

    sparsity: float
    multiple: float = 5.0
    spread: float = 0.08


Budget: TypeAlias = Uniform | Global | PerKind | Threshold | OWL


@dataclass(frozen=True)
class Entries:
    """What is ranked of one tensor or axis.

    scores: shape (entries,).
    kind: of the tensor or axis.
    cost: of one entry.
    floor: how many entries must stay (1 for axes, 0 for weights).
    """

    scores: np.ndarray
    kind: str = ""
    cost: float = 1.0
    floor: int = 0


def check_sparsity(sparsity: float) -> float:
    """The sparsity as a float; PlanError unless 0 <= sparsity < 1."""
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
    if isinstance(budget, OWL):
        return _by_outliers(entries, budget)
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


def outliers(scores: np.ndarray, multiple: float = 5.0) -> float:
    """Share of the scores (any shape) that exceed `multiple` times their mean."""
    return float((scores > multiple * scores.mean()).mean()) if scores.size else 0.0


def owl(shares: np.ndarray, sparsity: float, spread: float = 0.08, sizes: np.ndarray | None = None) -> np.ndarray:
    """Sparsity of each layer, shape (layers,), from its share of outliers: 1 - density, where
    density_l = 2 spread minmax(share)_l + a constant that makes the mean density 1 - `sparsity` (Yin et al., 2024).

    sizes: number of weights of each layer, by which the mean is weighted (default: all alike).
    Raises PlanError when a layer would lose or keep more than everything.
    """
    shares = np.asarray(shares, dtype=np.float64)
    reach = shares.max() - shares.min()
    lift = 2 * spread * (shares - shares.min()) / reach if reach > 0 else np.zeros_like(shares)
    by_layer = check_sparsity(sparsity) + np.average(lift, weights=sizes) - lift
    if by_layer.min() < 0 or by_layer.max() >= 1:
        raise PlanError(
            f"at sparsity {sparsity} a spread of {spread} gives layers from {by_layer.min():.3g} to "
            f"{by_layer.max():.3g}; lower the spread"
        )
    return by_layer


def least_loss(
    errors: np.ndarray, shares: np.ndarray, sizes: np.ndarray, weights: np.ndarray, sparsity: float
) -> np.ndarray:
    """Sparsity of each tensor, (tensors,), for which sum_i weights_i errors_i(share_i) is least while their mean,
    weighted by size, is `sparsity`. Steps are taken in the order of their cost for each weight that is pruned.

    errors (tensors, steps): error of each tensor at each of the shares, convex, linear between them.
    shares (steps,): sparsities in rising order.
    sizes (tensors,): number of weights.
    weights (tensors,): what an error costs.

    Raises PlanError when `sparsity` does not lie between the first and the last share.
    """
    if not shares[0] <= check_sparsity(sparsity) <= shares[-1]:
        raise PlanError(f"sparsity {sparsity} lies outside the shares {shares[0]:.3g} to {shares[-1]:.3g} on offer")
    size = np.asarray(sizes, dtype=np.float64)
    steps = size[:, None] * np.diff(shares)[None, :]
    cost = np.maximum.accumulate(weights[:, None] * np.diff(errors, axis=1) / steps, axis=1)
    order = np.argsort(cost, axis=None, kind="stable")
    taken = steps.reshape(-1)[order]
    left = size.sum() * sparsity - size.sum() * shares[0]
    taken = np.clip(left - (np.cumsum(taken) - taken), 0, taken)
    pruned = np.zeros(steps.size)
    pruned[order] = taken
    return shares[0] + pruned.reshape(steps.shape).sum(1) / size


def _by_outliers(entries: Mapping[str, Entries], budget: OWL) -> dict[str, int]:
    """What each tensor keeps under OWL."""
    layers = list(dict.fromkeys(e.kind for e in entries.values()))
    pooled = [np.concatenate([e.scores for e in entries.values() if e.kind == layer]) for layer in layers]
    shares = np.array([outliers(scores, budget.multiple) for scores in pooled])
    sizes = np.array([len(scores) for scores in pooled])
    sparsities = dict(zip(layers, owl(shares, budget.sparsity, budget.spread, sizes), strict=True))
    kept = {key: len(e.scores) - round(len(e.scores) * sparsities[e.kind]) for key, e in entries.items()}
    over = sum(kept.values()) - (sizes.sum() - round(sizes.sum() * budget.sparsity))
    for key in list(entries)[: abs(over)]:  # rounding: at most one weight a tensor
        kept[key] -= int(np.sign(over))
    return {key: max(count, min(entries[key].floor, len(entries[key].scores))) for key, count in kept.items()}


def _keep_share(count: int, sparsity: float, floor: int) -> int:
    """How many of `count` entries stay, never fewer than the floor (or all, where there are fewer)."""
    return max(count - round(count * sparsity), min(floor, count))


def _above(key: str, scores: np.ndarray, tau: float) -> int:
    """How many scores are above a threshold; PlanError where none is."""
    kept = int((scores > tau).sum())
    if kept == 0:
        raise PlanError(
            f"threshold {tau:g} would empty {key}, whose largest score is {scores.max():.4g}; lower the threshold"
        )
    return kept


def _lowest(entries: Mapping[str, Entries], sparsity: float) -> dict[str, int]:
    """Remove the lowest of one common ranking (score per cost) until the cost is met, and never go below a floor."""
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
    """`_lowest` for entries of equal cost, by one partition instead of a sort: weights come in millions."""
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
