"""How much a metric drops from the dense to the pruned model, with an interval over rows (paired bootstrap).

Source: Efron and Tibshirani, 1993; paired on the rows as in Koehn, 2004.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur import notebook
from secateur.errors import DataError
from secateur.metrics.metric import Metric

DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Drop:
    """A drop of a metric between two models on the same rows.

    metric: its name.
    dense, pruned: its values.
    drop: how much worse the pruned model is; negative where it is better.
    interval: the 95% interval of the drop; None for a single row.
    rows: how many rows there were.
    point: the difference that counts as one point.
    rows_for_a_point: how many rows it would take for an interval that is one point to either side; None for one row.
    """

    metric: str
    dense: float
    pruned: float
    drop: float
    interval: tuple[float, float] | None
    rows: int
    point: float
    rows_for_a_point: int | None

    def _repr_html_(self) -> str:
        numbers = (*map(notebook.number, (self.dense, self.pruned, self.drop)), notebook.interval(self.interval))
        columns = ("metric", "dense", "pruned", "drop", f"{CONFIDENCE:.0%} interval", "rows")
        return notebook.table("Drop", columns, [(self.metric, *numbers, f"{self.rows:,}")], notes=[self.reading])

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "metric": self.metric,
            "dense": self.dense,
            "pruned": self.pruned,
            "drop": self.drop,
            "drop_interval": None if self.interval is None else list(self.interval),
            "rows": self.rows,
            "rows_for_a_point": self.rows_for_a_point,
            "reading": self.reading,
        }

    @property
    def reading(self) -> str:
        """What the interval says, in a sentence."""
        if self.interval is None:
            return "one row says nothing about a drop"
        low, high = self.interval
        wanted = ""
        if self.rows_for_a_point is not None and self.rows_for_a_point > self.rows:
            wanted = f"; {self.rows_for_a_point:,} rows would tell {self.point:.3g} from no drop"
        if low > 0:
            return f"the pruned model is worse{wanted}"
        if high < 0:
            return f"the pruned model is better{wanted}"
        return f"{self.rows:,} rows do not tell the models apart{wanted}"


def drop(metric: Metric, dense: np.ndarray, pruned: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Drop:
    """Compare the statistics (rows, k) of two models on the same rows.

    draws: how many times the rows are drawn anew, with replacement, the same rows for both models.

    Raises DataError when the tables have different numbers of rows, or none.
    """
    if len(dense) != len(pruned) or not len(dense):
        raise DataError(f"{len(dense)} and {len(pruned)} rows cannot be compared in pairs")
    sign = 1.0 if metric.is_higher_better else -1.0
    before, after = metric.whole(dense), metric.whole(pruned)
    point = metric.point * abs(before) if metric.is_point_relative else metric.point
    interval = needed = None
    if len(dense) > 1:
        rng = np.random.default_rng(seed)
        values = np.empty(draws)
        for i in range(draws):
            rows = rng.integers(len(dense), size=len(dense))
            values[i] = sign * (metric.whole(dense[rows]) - metric.whole(pruned[rows]))
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        interval = (float(low), float(high))
        half = (interval[1] - interval[0]) / 2
        needed = max(2, math.ceil(len(dense) * (half / point) ** 2)) if math.isfinite(half) and point else None
    return Drop(metric.name, before, after, sign * (before - after), interval, len(dense), point, needed)
