"""The rows of a search, in parts that share no row."""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.schemas.record import DataFile
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Examples, Task

FEW, FEW_DECISIONS = 192, 256
"""Search rows that tell ridges and single layers apart. Rows with many decisions each, such as windows of tokens, do in
smaller number, and go in batches of no more decisions than this."""
MOST_DECISIONS = 2048
"""Decisions on which candidates are compared; rows beyond them are left out."""


@dataclass(frozen=True)
class Rows:
    """Rows of a task.

    train: encoded rows to heal on.
    calibration: batches of a part of them, for statistics.
    search: batches of other rows, on which candidates are compared and healing is stopped.
    test: batches of rows that only the report sees.
    batch_size: rows in a batch of healing.
    files: where the rows come from, for the record.
    """

    train: Examples
    calibration: Batches
    search: Batches
    test: Batches
    batch_size: int = 32
    files: Sequence[DataFile] = ()


def search_batches(task: Task, examples: Examples, batch_size: int) -> Batches:
    """The search rows in batches; few rows, and few to a batch, where each has many decisions."""
    each = max((task.decisions(task.collate([feature])) for feature in examples.features[:1]), default=1)
    rows = examples.take(max(1, MOST_DECISIONS // max(1, each)))
    return Batches(task, rows, max(1, min(batch_size, FEW_DECISIONS // max(1, each))))


def few_batches(task: Task, batches: Batches) -> int:
    """How many of the first batches have `FEW` rows, or as many of `FEW_DECISIONS` decisions as fit."""
    rows = decisions = 0
    for number in range(len(batches)):
        rows += len(batches.members(number))
        own = task.decisions(batches[number])
        decisions += own
        if rows >= FEW or decisions + own > FEW_DECISIONS:
            return number + 1
    return max(1, len(batches))
