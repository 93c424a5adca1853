"""The last files of a model that lost units block by block: config, plan, levels, card, record and hashes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.layout import Layout
from secateur.plan import Plan
from secateur.record import write_record
from secateur.records.model import matrices_of, model_type_of, sizes_of, units_of, weight_bytes
from secateur.records.provenance import data_file, provenance_of
from secateur.schemas.record import Asked, Record, Sizes, Units
from secateur.search.candidate import Candidate
from secateur.search.costs import Cost
from secateur.search.levels import Levels
from secateur.search.records import limit_of
from secateur.search.stored import save as save_levels
from secateur.torch.base.manifest import changes_of
from secateur.torch.files import describe
from secateur.torch.files.hashes import write_hashes
from secateur.torch.files.safetensors_header import INDEX
from secateur.torch.files.safetensors_shards import entries_of
from secateur.torch.files.saved_config import config_of, write_config
from secateur.torch.host import TorchHost
from secateur.torch.stream.journal import Workspace
from secateur.torch.stream.lazy_model import Skeleton
from secateur.torch.stream.run_result import write_rest

UNMEASURED = "the quality was not measured, as the whole model was never in memory; `secateur eval` does that"
FROM_SOURCE = ("use_cache", "dtype")
"""Entries of a config that the model on the meta device has otherwise than its source."""


@dataclass(frozen=True)
class UnitsReport:
    """What a run did.

    folder: the output. asked: each limit and what was reached. sizes, units: what is left of the dense model.
    needs: why the folder opens with secateur alone; empty for a stock checkpoint.
    notes: axes that were not searched, and why. resumed: how many blocks an interrupted run had finished.
    """

    folder: Path
    asked: Sequence[Asked]
    sizes: Sizes
    units: Sequence[Units]
    needs: str
    notes: Sequence[str]
    resumed: int = 0

    @property
    def reading(self) -> str:
        """The result in a sentence."""
        share = self.sizes.parameters / max(1, self.sizes.dense_parameters or 0)
        return f"{share:.1%} of the parameters, chosen by expected divergence"


def finish(
    work: Workspace,
    skeleton: Skeleton,
    small: TorchHost,
    layout: Layout,
    plan: Plan,
    levels: Levels,
    candidate: Candidate,
    costs: Sequence[Cost],
    calibration: Sequence[Path],
    seed: int,
    resumed: int,
) -> UnitsReport:
    """Write what belongs to no block, the index, the config and the records; then give the folder its name.

    small: the smaller model on the meta device. layout: of the dense model.
    """
    changes = changes_of(small.model)
    _restore(small.model.config, skeleton.config)
    config, reason = config_of(small.model, changes)
    folder = work.output if work.journal.finished else work.result
    if not work.journal.finished:
        rest = write_rest(work, skeleton, [block["path"] for block in work.journal.blocks])
        write_config(small.model, folder, changes, config)
        replace(plan, weights={}).save(folder)
        save_levels(levels, folder)
    report = UnitsReport(
        work.output,
        [limit_of(cost, candidate, {}) for cost in costs],
        sizes_of(layout, plan, bytes=weight_bytes(folder), dense_bytes=weight_bytes(skeleton.folder)),
        units_of(layout, plan),
        "" if config is not None else reason,
        list(levels.notes.values()),
        resumed,
    )
    if not work.journal.finished:
        counts = [math.prod(entry.shape) for entry in entries_of(folder).values()]
        describe.write(folder, skeleton.folder, type(small.model).__name__, counts)
        write_record(_record(work, skeleton, small, layout, plan, report, calibration, seed), folder)
        write_hashes(folder, {**{block["file"]: block["sha256"] for block in work.journal.blocks}, **rest})
    work.finish()
    return report


def _restore(config: Any, source: Any) -> None:
    """Give a config, and those inside it, the entries `FROM_SOURCE` of the config of the dense model."""
    for key in FROM_SOURCE:
        if hasattr(source, key):
            setattr(config, key, getattr(source, key))
    for name, value in vars(source).items():
        if hasattr(value, "to_diff_dict"):
            _restore(getattr(config, name), value)


def _record(
    work: Workspace,
    skeleton: Skeleton,
    small: TorchHost,
    layout: Layout,
    plan: Plan,
    report: UnitsReport,
    calibration: Sequence[Path],
    seed: int,
) -> Record:
    """The record of a run."""
    journal = work.journal
    return Record(
        title=work.output.name,
        model_type=model_type_of(small.model),
        reading=report.reading,
        asked=list(report.asked),
        sizes=report.sizes,
        units=list(report.units),
        matrices=matrices_of(layout, plan),
        notes=[UNMEASURED],
        provenance=provenance_of(
            seconds=(journal.settings.get("seconds") or 0.0) + sum(block["seconds"] for block in journal.blocks),
            seed=seed,
            data=[data_file("calibration", path) for path in calibration],
        ),
    )
