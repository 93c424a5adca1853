"""The records that `prune --report` shows: those of the written folders, with rows on which the models disagree."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.jobs.prune_model import Data
    from secateur.metrics.evaluation import Evaluation
    from secateur.metrics.outcome import Outcome
    from secateur.schemas.record import Example, Record
    from secateur.search.points import Found
    from secateur.search.rows import Rows
    from secateur.tasks.base.batches import Batches
    from secateur.tasks.base.task import Task


def of_folder(
    folder: Path,
    task: "Task | None" = None,
    test: "Batches | None" = None,
    dense: "Evaluation | None" = None,
    pruned: "Evaluation | None" = None,
) -> "list[Record]":
    """The record in a folder, in a list; with examples where both models were evaluated on the test rows."""
    from secateur.record import read_record

    record = read_record(folder)
    if record is None:
        return []
    if task is None or test is None or dense is None or pruned is None:
        return [record]
    return [record.model_copy(update={"examples": _examples(task, test, dense, pruned)})]


def of_outcome(outcome: "Outcome", material: "Data") -> "list[Record]":
    """The record of a usual run."""
    last = outcome.shortened or outcome.tuned or outcome.pruned
    return of_folder(Path(outcome.folder), material.task, material.test, outcome.dense, last)


def of_search(found: "Found", task: "Task", rows: "Rows") -> "list[Record]":
    """The records of a search: of each model of a frontier; else of the best one, whether it was written or not."""
    from secateur.search.records import record_of

    if found.best is None or found.origin is None:
        return []
    records = []
    for point in found.points if found.baselines else [found.best]:
        title = point.name if found.baselines or found.folder is None else found.folder.name
        examples = _examples(task, rows.test, found.origin.dense, point.final)
        records.append(record_of(found, point, title=title).model_copy(update={"examples": examples}))
    return records


def _examples(task: "Task", test: "Batches", dense: "Evaluation", found: "Evaluation") -> "list[Example]":
    from secateur.tasks.base.disagreements import disagreements

    return disagreements(task, test.examples, dense.predictions, found)
