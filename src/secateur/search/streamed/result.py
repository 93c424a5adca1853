"""The last files of a model that lost units block by block: config, plan, levels, card, record and hashes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.base.manifest import changes_of
from secateur.torch.files import describe
from secateur.torch.files.hashes import write_hashes
from secateur.torch.files.safetensors_shards import entries_of
from secateur.torch.files.saved_config import config_of, write_config
from secateur.torch.host import TorchHost
from secateur.torch.stream.journal import Workspace
from secateur.torch.stream.lazy_model import Skeleton
from secateur.torch.stream.run_result import write_rest

UNMEASURED = "the quality was not measured, as the whole model was never in memory; `secateur eval` does that"


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


@dataclass(frozen=True)
class ChosenUnits:
    """What was chosen for a model. layout: of the dense model. plan: without weights. costs: of the target."""

    layout: Layout
    plan: Plan
    levels: Levels
    candidate: Candidate
    costs: Sequence[Cost]


def finish(
    work: Workspace,
    skeleton: Skeleton,
    small: TorchHost,
    chosen: ChosenUnits,
    *,
    calibration: Sequence[Path],
    seed: int,
    resumed: int,
) -> UnitsReport:
    """Write what belongs to no block, the index, the config and the records; then give the folder its name.

    small: the smaller model on the meta device. Others: as `secateur.search.streamed.run.prune_units` takes them.
    """
    changes, layout, plan, levels = changes_of(small.model), chosen.layout, chosen.plan, chosen.levels
    small.model.config.dtype = skeleton.config.dtype  # which the model on the meta device does not have
    config, reason = config_of(small.model, changes)
    folder, blocks = place_of(work), work.journal.blocks
    rest: dict[str, str] = {}
    if not work.journal.finished:
        rest = write_rest(work, skeleton, [block["path"] for block in blocks])
        write_config(small.model, folder, changes, config)
        replace(plan, weights={}).save(folder)
        save_levels(levels, folder)
    report = UnitsReport(
        work.output,
        [limit_of(cost, chosen.candidate, {}) for cost in chosen.costs],
        sizes_of(layout, plan, bytes=weight_bytes(folder), dense_bytes=weight_bytes(skeleton.folder)),
        units_of(layout, plan),
        "" if config is not None else reason,
        list(levels.notes.values()),
        resumed,
    )
    if not work.journal.finished:
        counts = [math.prod(entry.shape) for entry in entries_of(folder).values()]
        describe.write(folder, skeleton.folder, type(small.model).__name__, counts)
        record = Record(
            title=work.output.name,
            task=TextGeneration.name,
            model_type=model_type_of(small.model),
            reading=report.reading,
            asked=list(report.asked),
            sizes=report.sizes,
            units=list(report.units),
            matrices=matrices_of(layout, plan),
            notes=[UNMEASURED],
            provenance=provenance_of(
                seconds=(work.journal.settings.get("seconds") or 0.0) + sum(block["seconds"] for block in blocks),
                seed=seed,
                data=[data_file("calibration", path) for path in calibration],
            ),
        )
        write_record(record, folder)
        write_hashes(folder, {**{block["file"]: block["sha256"] for block in blocks}, **rest})
    work.finish()
    return report


def place_of(work: Workspace) -> Path:
    """The folder of the result, which may have its name already where a run was killed at its very end."""
    return work.result if work.result.exists() else work.output
