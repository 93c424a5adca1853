"""Checkpoints of a training: the last whole one, and whether it is of this very training."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import DataError, shown
from secateur.files import write_json

PREFIX = "checkpoint-"
LAST_WRITTEN = "trainer_state.json"
"""What the Trainer writes last of a checkpoint."""
MARK = ".secateur-training-"
"""Start of the name of the file that says which training a folder of checkpoints belongs to."""


def last(folder: Path | str | None) -> Path | None:
    """The last whole checkpoint in a folder, or None."""
    if folder is None or not Path(folder).is_dir():
        return None
    steps = {
        int(path.name.removeprefix(PREFIX)): path
        for path in Path(folder).glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdecimal() and (path / LAST_WRITTEN).is_file()
    }
    return steps[max(steps)] if steps else None


def to_resume(folder: Path, identity: str, wanted: Any) -> Path | None:
    """The checkpoint from which a training goes on; None for its beginning. The folder is marked as its own.

    identity: of the training, see `identity_of`.
    wanted: `resume_from_checkpoint`: a folder is taken as it is, False begins anew; otherwise the last checkpoint.

    Raises DataError for a checkpoint that is missing, and for a folder with checkpoints of another training.
    """
    if isinstance(wanted, str):
        if not (Path(wanted) / LAST_WRITTEN).is_file():
            raise DataError(f"resume_from_checkpoint {shown(wanted)} is no checkpoint: it has no {LAST_WRITTEN}")
        return Path(wanted)
    found = None if wanted is False else last(folder)
    mark = folder / f"{MARK}{identity}"
    if found is not None and not mark.exists():
        raise DataError(
            f"{found} is of another training (other weights, zeros, rows or options); choose another output_dir, "
            "delete it, or name the checkpoint in resume_from_checkpoint"
        )
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{MARK}*"):
            other.unlink()
        write_json(mark, {})
    return found


def identity_of(model: torch.nn.Module, masks: Mapping[str, np.ndarray], *facts: Any) -> str:
    """A hash of what makes a training the same: weights at its beginning, zeros that are held, and other facts."""
    total = hashlib.sha256(repr(facts).encode())
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, mask in sorted(masks.items()):
        total.update(name.encode())
        total.update(np.packbits(mask).data)
    return total.hexdigest()[:16]
