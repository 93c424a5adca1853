"""Statistics and levels on disk: a killed run goes on from its last whole part, and levels are read again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import DataError, PlanError
from secateur.files import write_json
from secateur.schemas.levels import LevelsFile
from secateur.schemas.reading import read
from secateur.search.levels import AxisLevels, Levels
from secateur.stats import Stats
from secateur.tasks.base.evaluate import Track, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost
from secateur.torch.stats.curvature import collect_curvature
from secateur.training.checkpoints import identity_of

FORMAT = 1
LEVELS, STATS = "secateur-levels.json", "secateur-stats.safetensors"
_REMEDY = "delete it, and search again"


def collected(
    host: TorchHost,
    task: Task,
    batches: Sequence[Any],
    folder: Path | str | None = None,
    *,
    chunks: int = 4,
    seed: int = 0,
    track: Track = silent,
) -> Stats:
    """The curvature of the task's divergence at the model, over batches whose labels have no part in it.

    folder: where the sums are kept after each of `chunks` parts. A second call goes on from the last whole part, and
        begins anew where the sums are of another model, other batches or another seed. None keeps nothing.
    seed: of the draws in `Task.fisher_loss`. track: shows progress over the parts.

    Raises DataError when there is no batch.
    """
    if not len(batches):
        raise DataError("the data is empty: there is no batch; pass at least one")
    path = None if folder is None else Path(folder) / STATS
    identity = "" if path is None else identity_of_batches(host, task, batches, seed)
    total, done = (Stats(), 0) if path is None else _taken_up(path, identity)
    ends = sorted({round(len(batches) * (i + 1) / chunks) for i in range(chunks)} - {0})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    for end in track([end for end in ends if end > done], "statistics"):
        part = collect_curvature(
            host.model,
            host.layout,
            (batches[i] for i in range(done, end)),
            task.fisher_loss,
            task.examples_of,
            seed=seed,
            first=done,
        )
        total, done = total.merge(part), end
        if path is not None:
            total.save(path, {"identity": identity, "batches": str(done)})
    return total


def save(levels: Levels, folder: Path | str) -> None:
    """Write `secateur-levels.json` into an existing folder."""
    axes = {
        name: {
            "kind": axis.kind,
            "order": axis.order.tolist(),
            "losses": [float(loss) if np.isfinite(loss) else None for loss in axis.losses],
            "weight": axis.weight,
            "bias": axis.bias,
        }
        for name, axis in levels.axes.items()
    }
    layers = {name: [float(loss) for loss in losses] for name, losses in levels.layers.items()}
    data = {"format": FORMAT, "method": levels.method, "axes": axes, "layers": layers, "notes": dict(levels.notes)}
    write_json(Path(folder) / LEVELS, data)


def load(folder: Path | str) -> Levels:
    """Read what `save` wrote, from its folder or the file itself; PlanError when there is none or it is damaged."""
    path = Path(folder)
    path = path if path.suffix == ".json" else path / LEVELS
    if not path.is_file():
        raise PlanError(f"there is no {path}; pass a folder that a search has written")
    found = read(path, LevelsFile, error=PlanError, remedy=_REMEDY)
    axes = {}
    for name, one in found.axes.items():
        losses = np.array([np.inf if loss is None else loss for loss in one.losses])
        if sorted(one.order) != list(range(len(one.order))) or len(losses) != len(one.order) + 1:
            raise PlanError(f"{path} is damaged: the order of {name} is none of all its units; {_REMEDY}")
        axes[name] = AxisLevels(name, one.kind, np.array(one.order, dtype=np.int64), losses, one.weight, one.bias)
    return Levels(found.method, axes, {k: np.array(v) for k, v in found.layers.items()}, found.notes)


def _taken_up(path: Path, identity: str) -> tuple[Stats, int]:
    """The sums in a file and how many batches they are of; none where the file is missing, damaged or of other data."""
    if not path.is_file():
        return Stats(), 0
    try:
        found, notes = Stats.load(path)
    except DataError:
        return Stats(), 0
    done = notes.get("batches", "")
    return (found, int(done)) if notes.get("identity") == identity and done.isdecimal() else (Stats(), 0)


def identity_of_batches(host: TorchHost, task: Task, batches: Sequence[Any], seed: int) -> str:
    """A hash of what makes statistics the same: weights, batches, task and seed."""
    total = hashlib.sha256()
    for i in range(len(batches)):
        for name, value in batches[i].items():
            total.update(name.encode())
            if isinstance(value, torch.Tensor):
                total.update(repr((value.dtype, tuple(value.shape))).encode())
                total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                total.update(repr(value).encode())
    return identity_of(host.model, {}, task.name, seed, total.hexdigest())
