"""Metrics of numbers: mean squared error, Pearson's and Spearman's correlation; and the cosine of vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.metrics.metric import Metric, column, mean


def _pairs(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    return np.stack([np.asarray(predictions, np.float64), np.asarray(references, np.float64)], 1)


def _squared(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    difference = np.asarray(predictions, np.float64) - np.asarray(references, np.float64)
    return column(np.square(difference).reshape(len(difference), -1).mean(1))


def _pearson(table: np.ndarray) -> float:
    first, second = (table - table.mean(0)).T
    norm = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm else 0.0


def _spearman(table: np.ndarray) -> float:
    from scipy.stats import rankdata  # optional

    return _pearson(np.stack([rankdata(values) for values in table.T], 1))


def cosines(predictions: Sequence[Any] | np.ndarray, references: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The cosine of each vector to its reference, 0 where one of them is 0; a mean for rows of several vectors."""
    first, second = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found = np.divide((first * second).sum(-1), norms, out=np.zeros(norms.shape), where=norms > 0)
    return column(found.reshape(len(found), -1).mean(1))


SQUARED_ERROR = Metric("mean squared error", is_higher_better=False, rows=_squared, whole=mean)
PEARSON = Metric("Pearson", is_higher_better=True, rows=_pairs, whole=_pearson)
SPEARMAN = Metric("Spearman", is_higher_better=True, rows=_pairs, whole=_spearman)
COSINE = Metric("cosine", is_higher_better=True, rows=cosines, whole=mean)
