"""A job: give a model a schedule of tokens, save it, reload it, and measure it where there is data."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.dynamic.tokens import merge_tokens, prune_tokens
from secateur.files import new_folder
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation, compare
from secateur.plan import Plan
from secateur.records.model import model_type_of, sizes_of, weight_bytes
from secateur.records.outcome import asked_of_tokens
from secateur.records.provenance import provenance_of
from secateur.records.quality import in_words, quality_of, stages_of
from secateur.schemas.record import DataFile, Provenance, Record
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.token_schedule import TokenSchedule, schedule_of
from secateur.torch.files.hashes import add_record
from secateur.torch.host import TorchHost
from secateur.torch.reloaded import folder_bytes, reload_gap
from secateur.torch.tokens.install import schedule_on


@dataclass(frozen=True)
class Wanted:
    """The schedule that a user asks for.

    words: a preset, or per cents: see `secateur.token_schedule.schedule_of`.
    merges: whether tokens are merged, not pruned.

    Raises ModelError for words that are no schedule.
    """

    words: str
    merges: bool = False

    def __post_init__(self) -> None:
        schedule_of(self.words, self.words.count(",") + 1)

    def on(self, host: TorchHost) -> TorchHost:
        """A copy of the host with the schedule; ModelError where its tokens cannot be taken away."""
        return merge_tokens(host, self.words) if self.merges else prune_tokens(host, self.words)


@dataclass(frozen=True)
class Scheduled:
    """The result of the job.

    folder: the saved folder.
    schedule: the schedule.
    bytes: size of the folder.
    reload_difference: difference between the model and its folder, loaded again.
    dense: the evaluation of the model that was given; None without data.
    pruned: the evaluation with the schedule; None without data.
    drop: how much worse it is, with its interval; None without data.
    """

    folder: str
    schedule: TokenSchedule
    bytes: int
    reload_difference: float
    dense: Evaluation | None = None
    pruned: Evaluation | None = None
    drop: Drop | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        measured: dict[str, Any] = {}
        if self.dense is not None and self.pruned is not None and self.drop is not None:
            stages = {"dense": self.dense.as_json(), "tokens": self.pruned.as_json()}
            measured = {"task": self.dense.task, **self.drop.as_json(), "stages": stages}
        return {
            **measured,
            "folder": self.folder,
            "bytes": self.bytes,
            "reload_difference": self.reload_difference,
            **self.schedule.summary(),
        }


def run(
    host: TorchHost,
    wanted: Wanted,
    output: Path,
    *,
    task: Task | None = None,
    test: Batches | None = None,
    files: Sequence[DataFile] = (),
    overwrite: bool = False,
    track: Track = silent,
) -> Scheduled:
    """Write a copy of the host with a schedule; `host` itself stays as it is.

    task, test: what the model is for, and batches to measure it on; None to measure nothing.
    files: where the rows come from, for the record.

    Raises ModelError where no token can be taken away, or the reloaded model differs. Then nothing is written.
    """
    began = time.perf_counter()
    short = wanted.on(host)
    schedule = schedule_on(short.model)
    assert schedule is not None
    dense = pruned = drop = None
    if task is not None and test is not None:
        reference = Reference(task, host.model, test, track)
        dense, pruned = reference.evaluation(), evaluate(task, short.model, test, reference, track)
        drop = compare(dense, pruned)
    companions = {} if task is None else task.companions
    with new_folder(output, overwrite=overwrite) as temporary:
        short.save(temporary, host.plan, overwrite=True, **companions)
        gap = reload_gap(short, temporary, host.example if test is None else test[0])
        size = folder_bytes(temporary)
        done = Scheduled(str(output), schedule, size, gap, dense, pruned, drop)
        seconds = time.perf_counter() - began
        add_record(_record(done, host, temporary, provenance_of(seconds=seconds, data=files)), temporary)
    return done


def _record(done: Scheduled, host: TorchHost, folder: Path, provenance: Provenance) -> Record:
    """The record of a model with a schedule. folder: where it was written; provenance: how it was made."""
    plan = host.plan or Plan()
    record = Record(
        title=Path(done.folder).name,
        model_type=model_type_of(host.model),
        reading=str(done.schedule),
        asked=asked_of_tokens(done.schedule),
        sizes=sizes_of(host.layout, plan, bytes=weight_bytes(folder), dense_bytes=weight_bytes(host.source)),
        provenance=provenance,
    )
    if done.dense is None or done.pruned is None or done.drop is None:
        return record
    measured = {
        "task": done.dense.task,
        "reading": f"{done.schedule}; {in_words(done.drop)}",
        "quality": quality_of(done.drop, done.pruned),
        "stages": stages_of([("dense", done.dense), ("fewer tokens", done.pruned)]),
        "notes": [done.drop.reading],
    }
    return record.model_copy(update=measured)
