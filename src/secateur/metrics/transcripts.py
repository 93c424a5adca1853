"""Metrics of transcripts: word error rate and character error rate; jiwer aligns them.

Errors are words (or characters) that are replaced, left out or put in, over those of the reference. A row gives both
counts; the rate of several rows is that of their sums. Case and punctuation count.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from secateur.metrics.metric import Metric


def words(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Wrong words, and words of the reference, of each row (rows, 2)."""
    import jiwer  # optional

    return _counts(jiwer.process_words, predictions, references)


def characters(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Wrong characters, and characters of the reference, of each row (rows, 2)."""
    import jiwer  # optional

    return _counts(jiwer.process_characters, predictions, references)


def rate(table: np.ndarray) -> float:
    """Errors over what the references hold; the number of errors where these are all empty."""
    errors, count = table[:, :2].sum(0)
    return float(errors / max(count, 1.0))


def _counts(align: Callable[[str, str], Any], predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        found = align(reference, prediction)
        wrong = found.substitutions + found.deletions
        rows.append((wrong + found.insertions, wrong + found.hits))
    return np.asarray(rows, np.float64).reshape(-1, 2)


WORD_ERROR_RATE = Metric("word error rate", is_higher_better=False, rows=words, whole=rate)
CHARACTER_ERROR_RATE = Metric("character error rate", is_higher_better=False, rows=characters, whole=rate)
