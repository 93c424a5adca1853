"""Choice: the sizes of least expected divergence whose costs are within their bounds.

Losses and costs are sums over axes, so a price on each cost lets every axis choose by itself (Lagrange multipliers;
Everett, 1963). Bisection finds the price. What is left of the bound is filled by single moves and by exchanges between
two axes, which closes most of the distance to the optimum of the integer problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.errors import PlanError
from secateur.search.candidate import Candidate
from secateur.search.costs import Cost
from secateur.search.levels import AxisLevels, Levels

Inside = Mapping[str, tuple[str, int]]
"""Axis -> (axis of layers, layer), as `candidate.layer_of_axes` gives it."""
TOLERANCE = 1e-12
"""Shares of the dense cost that are rounding."""
MOVES = 600
"""Moves of which the exchanges look at all pairs."""


def choose(
    levels: Levels,
    costs: Sequence[Cost],
    *,
    dropped: Mapping[str, tuple[int, ...]] | None = None,
    inside: Inside | None = None,
) -> Candidate:
    """The sizes of least expected divergence such that every cost is within its bound.

    dropped: axis of layers -> the layers that go, in addition to what is chosen.
    inside: which axes lie in which layer, where layers go.

    Raises PlanError, with the least cost that can be reached, when a bound is below it.
    """
    gone = {axis: tuple(sorted(layers)) for axis, layers in (dropped or {}).items() if layers}
    table = _table(levels, costs, gone, inside or {})
    if not table.axes or not costs:
        table.check(costs)
        return Candidate(dropped=gone)
    table.check(costs)
    prices, picked = _priced(table, costs)
    filled = [_exchanged(table, _filled(table, picked, by_ratio=by_ratio), prices) for by_ratio in (False, True)]
    best = min(filled, key=lambda pick: float(table.losses[table.rows, pick].sum()))
    return _candidate(levels, table, best, gone)


def bounded(cost: Cost, bound: float) -> Cost:
    """The cost with another bound, as a share of the dense model's cost."""
    return replace(cost, limit=replace(cost.limit, bound=bound, relative=True))


def uniform(levels: Levels, cost: Cost) -> Candidate:
    """Every axis keeps the same share of its units, rounded to what is allowed: the baseline at the same cost.

    Raises PlanError, with the least cost that can be reached, when the bound is below it.
    """
    table = _table(levels, [cost], {}, {})
    table.check([cost])
    sizes = np.array([levels.axes[axis].size for axis in table.axes])
    distant = np.where(np.isfinite(table.losses), table.counts / np.maximum(sizes, 1)[:, None], np.inf)
    shares = np.unique(distant[np.isfinite(distant)])
    low, high = -1, len(shares) - 1
    while low < high:  # the largest share that fits
        middle = (low + high + 1) // 2
        if table.fits(np.abs(distant - shares[middle]).argmin(1)):
            low = middle
        else:
            high = middle - 1
    # Rounding can take single axes up, so that even the least share is too much: each axis then goes to its smallest.
    picked = np.abs(distant - shares[low]).argmin(1) if low >= 0 else distant.argmin(1)
    return _candidate(levels, table, picked, {})


def expected(levels: Levels, candidate: Candidate) -> float:
    """The sum of the expected divergences of the widths; layers that go do not count."""
    axes = ((levels.axes[axis], count) for axis, count in candidate.kept.items() if axis in levels.axes)
    return sum(float(axis.losses[axis.size - count]) for axis, count in axes)


def allowed_counts(axis: AxisLevels, costs: Sequence[Cost]) -> np.ndarray:
    """The numbers of units of an axis that every cost allows and the model can run with, ascending."""
    counts: np.ndarray = np.arange(axis.size + 1)
    for cost in costs:
        if axis.axis in cost.allowed:
            counts = np.intersect1d(counts, cost.allowed[axis.axis])
    counts = np.union1d(counts, [axis.size])
    return counts[np.isfinite(axis.losses[axis.size - counts])]


def within(candidate: Candidate, costs: Sequence[Cost]) -> bool:
    """Whether a candidate costs no more than every bound."""
    return all(cost.of(candidate) <= cost.bound + cost.correction * 10 * TOLERANCE for cost in costs)


# -- the problem as arrays --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Options of every axis, padded to the same number with options of infinite loss.

    counts, losses: (axes, options). changes: of each cost, (costs, axes, options). room: the most that the changes of
    a cost may add up to, (costs,).
    """

    axes: tuple[str, ...]
    counts: np.ndarray
    losses: np.ndarray
    changes: np.ndarray
    room: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.axes))

    def slack(self, picked: np.ndarray) -> np.ndarray:
        """What is left of each bound, (costs,)."""
        return self.room - self.changes[:, self.rows, picked].sum(1)

    def fits(self, picked: np.ndarray) -> bool:
        return bool((self.slack(picked) >= -TOLERANCE).all())

    def check(self, costs: Sequence[Cost]) -> None:
        """PlanError when a bound is below the least cost."""
        for index, cost in enumerate(costs):
            possible = np.where(np.isfinite(self.losses), self.changes[index], np.inf)
            least = float(possible.min(1).sum()) if self.axes else 0.0
            if least > self.room[index] + TOLERANCE:
                total = cost.bound + (least - float(self.room[index])) * cost.correction
                raise PlanError(_unreachable(cost, total))


def _unreachable(cost: Cost, least: float) -> str:
    unit = {"macs": "multiply-accumulates", "params": "parameters", "latency": "ms"}.get(
        cost.limit.quantity, cost.limit.quantity
    )
    if cost.limit.relative:
        asked, reached = f"{cost.bound:.1%}", f"{least:.1%} of the dense model's {cost.limit.quantity}"
    else:
        asked, reached = f"{cost.limit.bound:,.4g}", f"{least * cost.dense:,.4g} {unit}"
    return f"a {cost.limit.quantity} of {asked} cannot be reached: the least is {reached}; raise the bound"


def _table(levels: Levels, costs: Sequence[Cost], dropped: Mapping[str, tuple[int, ...]], inside: Inside) -> _Table:
    names, options = [], []
    for name, axis in levels.axes.items():
        outer, layer = inside.get(name, ("", -1))
        if layer not in dropped.get(outer, ()) and any(name in cost.curves for cost in costs):
            names.append(name)
            options.append(allowed_counts(axis, costs))
    most = max((len(counts) for counts in options), default=0)
    counts = np.zeros((len(names), most), dtype=np.int64)
    losses = np.full((len(names), most), np.inf)
    changes = np.zeros((len(costs), len(names), most))
    for i, (name, own) in enumerate(zip(names, options, strict=True)):
        counts[i, : len(own)] = own
        losses[i, : len(own)] = levels.axes[name].losses[levels.axes[name].size - own]
        for c, cost in enumerate(costs):
            if name in cost.curves:
                changes[c, i, : len(own)] = cost.curves[name][own]
    alone = Candidate(dropped=dropped)
    room = np.array([(cost.bound - cost.of(alone)) / cost.correction for cost in costs])
    return _Table(tuple(names), counts, losses, changes, room)


def _candidate(levels: Levels, table: _Table, picked: np.ndarray, dropped: Mapping[str, tuple[int, ...]]) -> Candidate:
    counts = dict(zip(table.axes, table.counts[table.rows, picked].tolist(), strict=True))
    return Candidate({axis: n for axis, n in counts.items() if n < levels.axes[axis].size}, dropped)


# -- prices -----------------------------------------------------------------------------------------------------------


def _pick(table: _Table, prices: np.ndarray) -> np.ndarray:
    """The option of each axis that is cheapest, its costs at these prices included, (axes,)."""
    return (table.losses + np.tensordot(prices, table.changes, 1)).argmin(1)


def _priced(table: _Table, costs: Sequence[Cost]) -> tuple[np.ndarray, np.ndarray]:
    """Prices (costs,) and the options that they lead to, which fit.

    Several costs: each price is found while the others stay, in turn, until none changes (coordinate ascent on the
    dual).
    """
    prices = np.zeros(len(table.room))
    for _ in range(1 if len(prices) == 1 else 10):
        before = prices.copy()
        for index in range(len(prices)):
            prices[index] = _price(table, prices, index)
        if np.allclose(before, prices, rtol=1e-3, atol=0):
            break
    picked = _pick(table, prices)
    for _ in range(200):
        if table.fits(picked):
            return prices, picked
        prices = prices * 1.2  # later prices have moved the options off an earlier bound
        picked = _pick(table, prices)
    names = " and ".join(cost.limit.quantity for cost in costs)
    raise PlanError(f"no sizes were found that are within the bounds of {names} together; raise one of them")


def _price(table: _Table, prices: np.ndarray, index: int) -> float:
    """The least price of one cost at which its bound holds, the other prices as they are."""

    def fits(price: float) -> bool:
        tried = prices.copy()
        tried[index] = price
        return bool(table.slack(_pick(table, tried))[index] >= -TOLERANCE)

    if fits(0.0):
        return 0.0
    finite = table.losses[np.isfinite(table.losses)]
    high = float(prices[index]) or max(float(finite.max(initial=0.0)), 1e-30) * 1e-6
    while high > 1e-200 and fits(high / 8):
        high /= 8
    for _ in range(100):
        if fits(high):
            break
        high *= 8
    low = high / 8
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


# -- what is left of the bound ----------------------------------------------------------------------------------------


def _filled(table: _Table, picked: np.ndarray, *, by_ratio: bool) -> np.ndarray:
    """Single axes move to better options while these fit: the largest gain first, or the largest gain per cost."""
    picked = picked.copy()
    for _ in range(200):
        gains = table.losses[table.rows, picked][:, None] - table.losses
        extra = table.changes - table.changes[:, table.rows, picked][:, :, None]
        fit = (extra <= table.slack(picked)[:, None, None] + TOLERANCE).all(0) & (gains > 0)
        if not fit.any():
            break
        worth = gains / np.maximum(extra.max(0), TOLERANCE) if by_ratio else gains
        axis, option = np.unravel_index(np.where(fit, worth, -np.inf).argmax(), gains.shape)
        picked[axis] = option
    return picked


def _exchanged(table: _Table, picked: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Two axes move together while that helps; the options of each that are next best at the prices are looked at."""
    if len(table.axes) < 2:
        return picked
    few = max(2, min(MOVES // len(table.axes), table.losses.shape[1]))
    reduced = table.losses + np.tensordot(prices, table.changes, 1)
    options = np.argpartition(reduced, few - 1, axis=1)[:, :few] if few < reduced.shape[1] else np.argsort(reduced, 1)
    axis, option = np.repeat(table.rows, options.shape[1]), options.reshape(-1)
    usable = np.isfinite(table.losses[axis, option])
    axis, option = axis[usable], option[usable]
    other = axis[:, None] != axis[None, :]
    for _ in range(30):
        gains = table.losses[axis, picked[axis]] - table.losses[axis, option]
        extra = table.changes[:, axis, option] - table.changes[:, axis, picked[axis]]
        fit = other & ((extra[:, :, None] + extra[:, None, :]) <= table.slack(picked)[:, None, None] + TOLERANCE).all(0)
        together = np.where(fit, gains[:, None] + gains[None, :], -np.inf)
        first, second = np.unravel_index(together.argmax(), together.shape)
        if together[first, second] <= TOLERANCE * table.losses[table.rows, picked].sum():
            break
        picked = picked.copy()
        picked[axis[first]], picked[axis[second]] = option[first], option[second]
    return picked
