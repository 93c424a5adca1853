"""The rows of a search, in parts that share no row."""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.schemas.record import DataFile
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Examples


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
