"""Rows on which a model answers something else than the dense one, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.data.media import thumbnail
from secateur.metrics.evaluation import Evaluation
from secateur.records.quality import finite
from secateur.schemas.record import Example
from secateur.tasks.base.task import Examples, Task

MOST = 12
"""Rows that are shown."""
LONGEST, LONGEST_ANSWER = 400, 160
"""Characters that are shown of a row, and of an answer."""


def disagreements(
    task: Task, examples: Examples, dense: Sequence[Any], found: Evaluation, *, most: int = MOST
) -> list[Example]:
    """The rows whose answer is another one than the dense model's, the largest divergence first.

    examples: the rows. dense: the dense model's prediction of each. found: the evaluation of the other model on them.
    """
    same = [task.same(own, other) for own, other in zip(found.predictions, dense, strict=True)]
    rows = [row for row, is_same in enumerate(same) if is_same is not None and is_same < 1]
    far = np.full(examples.count, np.nan) if found.row_divergences is None else found.row_divergences
    rows.sort(key=lambda row: -float(np.nan_to_num(far[row], nan=-1.0)))
    return [_example(task, examples, row, dense[row], found.predictions[row], float(far[row])) for row in rows[:most]]


def _example(task: Task, examples: Examples, row: int, dense: Any, pruned: Any, divergence: float) -> Example:
    known = examples.references
    expected = None if known is None else task.expected(known[row])
    text = examples.inputs[row] if row < len(examples.inputs) else ""
    is_image = examples.picture is not None
    return Example(
        kind="image" if is_image else "text" if _is_text(examples) else "other",
        shown=thumbnail(examples.picture(row)) if examples.picture is not None else _cut(text, LONGEST),
        expected=None if expected is None else _cut(expected, LONGEST_ANSWER),
        dense=_cut(task.answer(dense), LONGEST_ANSWER),
        pruned=_cut(task.answer(pruned), LONGEST_ANSWER),
        divergence=finite(divergence),
    )


def _is_text(examples: Examples) -> bool:
    """Whether rows are texts, and not the names of files."""
    return bool(examples.features) and "input_ids" in examples.features[0]


def _cut(text: str, most: int) -> str:
    """The text in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
