"""Metrics of classes: accuracy, F1 (macro and micro), average precision; computed by scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.metrics.metric import ACCURACY, Metric, column, mean


def _pairs(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    return np.stack([np.asarray(predictions, np.int64), np.asarray(references, np.int64)], 1)


def _macro_f1(table: np.ndarray) -> float:
    from sklearn.metrics import f1_score  # optional

    return float(f1_score(table[:, 1], table[:, 0], average="macro", zero_division=0))


CLASSES = (ACCURACY, Metric("macro F1", is_higher_better=True, rows=_pairs, whole=_macro_f1))
"""Of one class a row; predictions and references are class numbers."""

# -- several labels a row ---------------------------------------------------------------------------------------------


def _scores_and_labels(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(predictions, np.float64), np.asarray(references, np.float64)], 1)


def _halves(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = table.shape[1] // 2
    return table[:, :half], table[:, half:] > 0.5


def _micro_f1(table: np.ndarray) -> float:
    scores, labels = _halves(table)
    chosen = scores > 0
    hits = float((chosen & labels).sum())
    total = float(chosen.sum() + labels.sum())
    return 2 * hits / total if total else 1.0


def _average_precision(table: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score  # optional

    scores, labels = _halves(table)
    present = labels.any(0)
    return (
        float(average_precision_score(labels[:, present], scores[:, present], average="macro"))
        if present.any()
        else 0.0
    )


def _all_equal(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    chosen = np.asarray(predictions) > 0
    return column((chosen == (np.asarray(references) > 0.5)).all(1))


MULTI_LABEL = (
    Metric("micro F1", is_higher_better=True, rows=_scores_and_labels, whole=_micro_f1),
    Metric("average precision", is_higher_better=True, rows=_scores_and_labels, whole=_average_precision),
    Metric("all labels right", is_higher_better=True, rows=_all_equal, whole=mean),
)
"""Predictions are logits (labels,), references 0 or 1 (labels,)."""
