"""Results of finished stages on disk, so that a run that was killed goes on where it stopped."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import ModelError
from secateur.files import write_json
from secateur.runtime.layers.tuning import cache_file
from secateur.schemas.reading import read_json
from secateur.search.rows import Rows
from secateur.search.stored import identity_of_batches
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost

KEPT = 3
"""How many runs stay on disk; the oldest go first."""


class Journal:
    """JSON values of stages in one folder. What cannot be read is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, stage: str, make: Callable[[], Any]) -> Any:
        """The value of a stage: from disk, or made now and written."""
        file = self.folder / f"{stage}.json"
        if file.is_file():
            try:
                return read_json(file, error=ModelError, remedy="the stage runs again")["value"]
            except (ModelError, KeyError, TypeError):
                file.unlink()
        value = make()
        write_json(file, {"value": value})
        return value

    def has(self, stage: str) -> bool:
        """Whether a stage has a value on disk."""
        return (self.folder / f"{stage}.json").is_file()


def forget_old(parent: Path, current: Path) -> None:
    """Delete all but the latest `KEPT` folders under `parent`; `current` always stays."""
    others = sorted((p for p in parent.iterdir() if p.is_dir() and p != current), key=lambda p: p.stat().st_mtime)
    for folder in others[: max(0, len(others) - KEPT + 1)]:
        shutil.rmtree(folder, ignore_errors=True)


def work_folder(host: TorchHost, task: Task, rows: Rows) -> Path:
    """Where a search of this model on these rows keeps its stages: in the user's cache, where the latest runs stay."""
    batches = [*rows.calibration, *rows.search, *rows.test]
    parent = cache_file().parent / "search"
    folder = parent / identity_of_batches(host, task, batches, rows.batch_size)[:20]
    folder.mkdir(parents=True, exist_ok=True)
    forget_old(parent, folder)
    return folder
