"""Opens a saved model together with its task: finds what it is for, loads it with its processor, encodes data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.data.table import Table, shuffled, split_table
from secateur.errors import DataError, ModelError, listed
from secateur.jobs.prune_model import Data
from secateur.layout import Layout
from secateur.records.provenance import data_file
from secateur.schemas.record import DataFile
from secateur.schemas.sentence_folder import read_modules
from secateur.search.rows import Rows, search_batches
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Examples, Options, Task
from secateur.tasks.feature_extraction import FeatureExtraction
from secateur.tasks.find import TASKS, auto_class_for, headless, named, task_of_config
from secateur.tasks.text_classification import LABEL
from secateur.torch.data.pooling import is_pooled
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model, open_module, read_config

HELD_OUT = 0.1
"""Share of the rows that is held out for the report where there is no other data for it."""
SEARCHED, MOST_SEARCHED = 0.15, 1000
"""Share of the other rows on which candidates are compared, and how many these are at most."""


@dataclass(frozen=True)
class Opened:
    """A model folder before its weights are read.

    source: folder or hub id.
    task: what the model is for.
    auto_class: the Auto class that loads it for a task that its config does not name; None for the config's own class.
    options: for `from_pretrained`.
    """

    source: str
    task: type[Task]
    auto_class: str | None
    options: dict[str, Any]

    def model(self, **more: Any) -> Any:
        """The model, loaded for the task."""
        return load_model(self.source, task=self.auto_class, **self.options, **more)

    def of(self, model: Any, options: Options | None = None) -> Task:
        """The task, with the processor of the folder."""
        return self.task(model, self.task.load_processor(self.source, **self.options), options)


def look(source: str, task: str | None, *, trust_remote_code: bool = False) -> Opened:
    """Find out what a model is for, from its config alone.

    Raises ModelError when none of the tasks fits, DataError for a task that does not exist.
    """
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    wanted = None if task is None else named(task)
    config = read_config(source, **options)
    found = task_of_config(config)
    if wanted is None and Path(source).is_dir() and is_pooled(read_modules(Path(source))):
        wanted = FeatureExtraction
    if wanted is not None and wanted is not found:
        return Opened(source, wanted, auto_class_for(wanted, config), options)
    if found is None:
        raise ModelError(f"{source} names no task in its config; pass --task, one of {listed(t.name for t in TASKS)}")
    return Opened(source, found, None, options)


def open_to_train(
    source: str,
    task: str | None,
    table: Table,
    options: Options,
    *,
    trust_remote_code: bool = False,
    new_head: Callable[[Sequence[str]], None] = lambda names: None,
) -> Task:
    """The task of a model that is to be trained; one whose checkpoint is of another task gets a new head for the data.

    task: its name; default: what the config says, or classification for a model without a head. Language models
        become classifiers too where the data has labels.
    new_head: is called with the names of the tensors that are new.
    """
    torch.manual_seed(options.seed)  # of the new head
    try:
        opened = look(source, task, trust_remote_code=trust_remote_code)
    except ModelError:
        if task is not None:
            raise
        opened = None
    if opened is None or (task is None and not opened.task.is_supervised and _has_labels(table, options)):
        remote = {"trust_remote_code": True} if trust_remote_code else {}
        kind = headless(read_config(source, **remote))
        opened = look(source, kind.name, trust_remote_code=trust_remote_code)
    head = opened.task.new_head(table, options) if opened.auto_class is not None else {}
    return opened.of(opened.model(new_head=new_head, **head), options)


def _has_labels(table: Table, options: Options) -> bool:
    """Whether the user names a column of labels, or the table has one of the usual names."""
    return options.columns.get("label") is not None or not set(LABEL.usual).isdisjoint(table.columns)


def open_host(opened: Opened, task_options: Options, layout: Layout | None = None) -> tuple[TorchHost, Task]:
    """Load and trace a model; the host, and the task with the model's processor."""
    model = opened.model()
    task = opened.of(model, task_options)
    host = open_module(model, layout=layout, loss=task.loss if task.has_own_loss else None)
    host.source = opened.source
    return host, task


def prepare_search(
    task: Task,
    table: Table,
    held_out: Table | None,
    *,
    calibration_samples: int,
    batch_size: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
) -> Rows:
    """Encode rows for a search: test rows as `prepare` holds them out, and search rows that are not trained on."""
    by = _strata(task, table)
    if held_out is None:
        table, held_out = split_table(table, HELD_OUT, seed, by)
    share = min(SEARCHED, MOST_SEARCHED / max(1, len(table)))
    table, searched = split_table(table, share, seed, by)
    train, search, test = _encoded(task, (table, searched, held_out), say)
    calibration, testing = (Batches(task, part, batch_size) for part in (train.take(calibration_samples), test))
    searching = search_batches(task, search, batch_size)
    files = _files([("training", table), ("search", searched), ("test", held_out)])
    return Rows(train, calibration, searching, testing, batch_size, files)


def _encoded(task: Task, parts: Sequence[Table], say: Callable[[str], None]) -> list[Examples]:
    """The rows of each part, which all have labels or none; `say` gets what the task notes about them."""
    encoded = [task.encode(part) for part in parts]
    if len({part.references is None for part in encoded}) > 1:
        raise DataError("one part of the data has labels, the other has none")
    for note in task.notes:
        say(note)
    return encoded


def _strata(task: Task, table: Table) -> str | None:
    """The column whose values each part of a split has the same share of; None where there is no such column."""
    chosen = task.choose(table).names.get("label", ())
    return chosen[0] if len(chosen) == 1 and task.is_stratified else None


def prepare(
    task: Task,
    table: Table,
    held_out: Table | None,
    *,
    calibration_samples: int,
    batch_size: int,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
) -> Data:
    """Encode rows; unless there are `held_out` rows for the report, hold out a tenth, stratified by label."""
    if held_out is None:
        table, held_out = split_table(table, HELD_OUT, seed, _strata(task, table))
    else:
        table = shuffled(table, seed)
    train, test = _encoded(task, (table, held_out), say)
    calibration = Batches(task, train.take(calibration_samples), batch_size)
    files = _files([("training", table), ("test", held_out)])
    return Data(task, train, calibration, Batches(task, test, batch_size), batch_size, files)


def _files(parts: Sequence[tuple[str, Table]]) -> list[DataFile]:
    """Where the rows of each part come from: (role, rows)."""
    return [data_file(role, table.source, len(table)) for role, table in parts]
