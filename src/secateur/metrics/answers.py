"""Metrics of answers that are read in a text: F1 of their words, and whether they are the same.

Both ignore case, punctuation and articles, and take the best of several references (Rajpurkar et al., 2016); where
there is no answer, only an empty one is right (Rajpurkar et al., 2018). Predictions are texts; a reference is a list of
texts, empty where there is no answer, or one text.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from secateur.metrics.metric import Metric, column, mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """A text in lower case, without punctuation and articles, its words with one blank between them."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(prediction: str, reference: str) -> float:
    """The harmonic mean of how many words of each text are in the other; of empty texts 1 where both are."""
    own, gold = normalised(prediction).split(), normalised(reference).split()
    if not own or not gold:
        return float(own == gold)
    common = sum((Counter(own) & Counter(gold)).values())
    return 2 * common / (len(own) + len(gold))


def is_same(prediction: str, reference: str) -> float:
    """1 where the texts are the same when normalised, else 0."""
    return float(normalised(prediction) == normalised(reference))


def _best(score: Callable[[str, str], float]) -> Callable[[Sequence[Any], Sequence[Any]], np.ndarray]:
    """Scores of rows, each against the reference that fits best."""

    def rows(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return column([max(score(own, gold) for gold in _texts(reference)) for own, reference in pairs])

    return rows


def _texts(reference: Any) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference) or [""]


ANSWERS = (
    Metric("answer F1", is_higher_better=True, rows=_best(f1), whole=mean),
    Metric("exact match", is_higher_better=True, rows=_best(is_same), whole=mean),
)
