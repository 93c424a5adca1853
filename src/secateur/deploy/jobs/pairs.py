"""Two artefacts timed in turn until the ratio of their times is known well enough."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.deploy.runner import Worker

REQUEST_S = 0.1
"""Seconds that the runs of one turn should take: short ones are repeated, so that a turn is more than noise."""
MOST_RUNS = 50
LEAST_TURNS = 8
"""Turns before an interval of a median says anything: of fewer, it spans nearly all of them."""


@dataclass(frozen=True)
class Pairs:
    """Times of two artefacts, turn by turn.

    first, second: median seconds of a run in each turn; (turns,).
    """

    first: Sequence[float]
    second: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """The second over the first, ascending."""
        return sorted(b / a for a, b in zip(self.first, self.second, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """A 95% interval of the median ratio, by order statistics (Conover, 1999)."""
        ratios = self.ratios
        reach = 0.98 * math.sqrt(len(ratios))
        low, high = math.floor(len(ratios) / 2 - reach), math.ceil(len(ratios) / 2 + reach)
        return ratios[max(0, low)], ratios[min(len(ratios) - 1, high)]

    @property
    def quartiles(self) -> tuple[float, float]:
        """The quartiles of the paired ratios."""
        if len(self.first) < 2:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high

    @property
    def uncertainty(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        low, high = self.interval
        return (high - low) / 2 / self.ratio


def quartiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """The quartiles of times in seconds, in milliseconds; of a single time the time itself, twice."""
    if len(seconds) < 2:
        return 1e3 * seconds[0], 1e3 * seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e3 * low, 1e3 * high


def time_pairs(
    first: Worker, second: Worker, *, within: float = 0.015, turns: int = 400, seconds: float = 40.0
) -> Pairs:
    """Time two artefacts in turn (A B A B ...) until the median of the paired ratios is known.

    within: largest half width of its 95% interval, relative, at which timing ends, after `LEAST_TURNS`.
    turns, seconds: of each artefact at most, whatever the interval.
    """
    start = time.perf_counter()
    once = statistics.median([*first.time(1), *second.time(1)])
    runs = max(1, min(MOST_RUNS, round(REQUEST_S / once)))
    pairs = Pairs([], [])
    for turn in range(1, turns + 1):
        pairs = Pairs(
            [*pairs.first, statistics.median(first.time(runs))], [*pairs.second, statistics.median(second.time(runs))]
        )
        known = turn >= LEAST_TURNS and pairs.uncertainty <= within
        if known or time.perf_counter() - start > 2 * seconds:
            break
    return pairs
