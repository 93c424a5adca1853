"""Metrics of tags of words: F1, precision and recall of entities as a whole, and the share of right tags.

An entity counts where its type, its first and its last word are right (Tjong Kim Sang, 2002; Ramshaw and Marcus, 1995).
Predictions and references are lists of tags, one for each word of a row.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.metrics.metric import Metric, ratio

OUTSIDE = "O"
"""The tag of words that belong to no entity."""
_PREFIXED = re.compile(r"([BIEMLSU])(?:-(.+))?")
BEGINS, ENDS = frozenset("BSU"), frozenset("ELSU")
"""Prefixes of a word that is the first of an entity, or the last (BIOES: S, E; BILOU: U, L)."""


@dataclass(frozen=True)
class Span:
    """An entity.

    kind: its type.
    start, end: its words, the end exclusive.
    """

    kind: str
    start: int
    end: int


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities in tags by any usual scheme: IOB1, IOB2 (BIO), BIOES, BILOU, or types without prefixes.

    An entity begins at a prefix that says so, after a word outside, and where the type changes.
    """
    found: list[Span] = []
    kind, start = "", None
    for i, tag in enumerate(tags):
        prefix, own = _parts(tag)
        if start is not None and (tag == OUTSIDE or prefix in BEGINS or own != kind):
            found.append(Span(kind, start, i))
            start = None
        if tag == OUTSIDE:
            continue
        if start is None:
            kind, start = own, i
        if prefix in ENDS:
            found.append(Span(kind, start, i + 1))
            start = None
    if start is not None:
        found.append(Span(kind, start, len(tags)))
    return found


def names_entities(tags: Iterable[str]) -> bool:
    """Whether tags mark entities, rather than, say, a part of speech for every word."""
    return any(tag == OUTSIDE or ("-" in tag and _PREFIXED.fullmatch(tag)) for tag in tags)


def _parts(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag; a tag without a prefix is inside an entity of its own name, `B` has no type."""
    match = _PREFIXED.fullmatch(tag)
    return (match[1], match[2] or "") if match else ("I", tag)


# -- metrics ----------------------------------------------------------------------------------------------------------


def entity_counts(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """For each row how many entities are right, predicted, and in the reference: (rows, 3)."""
    table = np.zeros((len(references), 3))
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        own, gold = set(spans(prediction)), set(spans(reference))
        table[row] = len(own & gold), len(own), len(gold)
    return table


def tag_counts(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """For each row how many tags are right, and how many there are: (rows, 2)."""
    pairs = zip(predictions, references, strict=True)
    return np.array([(sum(a == b for a, b in zip(p, r, strict=True)), len(r)) for p, r in pairs], np.float64).reshape(
        -1, 2
    )


def f1(table: np.ndarray) -> float:
    """Micro F1 of entity counts; 1 where there is no entity on either side."""
    right, predicted, gold = table.sum(0)
    return float(2 * right / (predicted + gold)) if predicted + gold else 1.0


def precision(table: np.ndarray) -> float:
    """The share of the predicted entities that is right; of none 1, unless there was one to find."""
    right, predicted, gold = table.sum(0)
    return float(right / predicted) if predicted else float(gold == 0)


def recall(table: np.ndarray) -> float:
    """The share of the entities of the reference that is found; of none 1, unless one was predicted."""
    right, predicted, gold = table.sum(0)
    return float(right / gold) if gold else float(predicted == 0)


TOKEN_ACCURACY = Metric("token accuracy", is_higher_better=True, rows=tag_counts, whole=ratio)
ENTITIES = (
    Metric("entity F1", is_higher_better=True, rows=entity_counts, whole=f1),
    Metric("precision", is_higher_better=True, rows=entity_counts, whole=precision),
    Metric("recall", is_higher_better=True, rows=entity_counts, whole=recall),
    TOKEN_ACCURACY,
)
