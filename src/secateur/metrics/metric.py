"""Metric: what a list of predictions is worth, computed from statistics of single rows, so that rows can be redrawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A number for predictions against references.

    name: what it is called in tables and JSON.
    is_higher_better: its direction.
    rows: (predictions, references) -> statistics (rows, k), the line of a row from its prediction and reference alone.
    whole: statistics (n, k) of any n rows -> the value.
    point: the difference that counts as one point: 0.01 of a share, 1 of a score up to 100.
    is_point_relative: whether `point` is a share of the dense model's value.
    """

    name: str
    is_higher_better: bool
    rows: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]
    whole: Callable[[np.ndarray], float]
    point: float = 0.01
    is_point_relative: bool = False


def mean(table: np.ndarray) -> float:
    """The mean of the first column."""
    return float(table[:, 0].mean())


def ratio(table: np.ndarray) -> float:
    """The sum of the first column over that of the second; 0 where that is 0."""
    first, second = table[:, :2].sum(0)
    return float(first / second) if second else 0.0


def column(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Numbers of rows as a table of one column, in float64."""
    return np.asarray(values, np.float64).reshape(-1, 1)


def equal(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """1 for a row whose prediction is its reference, else 0."""
    return column([float(p == r) for p, r in zip(predictions, references, strict=True)])


ACCURACY = Metric("accuracy", is_higher_better=True, rows=equal, whole=mean)
