"""The model card of a folder that is being saved, from what the model and its source say; jobs that measure the model
write a fuller one.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from secateur.card.front_matter import read_front_matter
from secateur.card.page import PRUNED, carried, is_hub_id
from secateur.card.write import NAME, write_card
from secateur.schemas.record import Record, Sizes


def describe(model: nn.Module, folder: Path, *, source: Path | None, is_pruned: bool) -> None:
    """Write the card of a model into its folder.

    source: the folder that the model came from.
    """
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if source is None and name and Path(name).is_dir():
        source = Path(name)
    hub = name if getattr(config, "_commit_hash", None) else None  # without it, the name may be that of a folder
    write(
        folder,
        source,
        type(model).__name__,
        (parameter.numel() for parameter in model.parameters()),
        hub=hub,
        is_pruned=is_pruned,
    )


def write(
    folder: Path,
    source: Path | None,
    name: str,
    counts: Iterable[int],
    *,
    zeros: int = 0,
    hub: str | None = None,
    is_pruned: bool = True,
) -> None:
    """Write a card.

    name: of the model's class, for a model of which no hub id is known. counts: numbers of elements of its parameters.
    zeros: how many of these are zero, where that is known. hub: the hub id that the model came from.
    """
    origin = carried(read_front_matter(source / NAME)) if source is not None else {}
    base = hub if is_hub_id(hub) else hub_id_of(source)
    if base is not None:
        origin["base_model"] = base
    if is_pruned:
        origin["tags"] = [PRUNED]
    total = sum(counts)
    title = f"{base.rpartition('/')[2] if base else name}{', pruned' if is_pruned else ''}"
    write_card(Record(title=title, sizes=Sizes(parameters=total, nonzero=total - zeros)), folder, origin)


def hub_id_of(folder: Path | None) -> str | None:
    """The hub id of a folder in the cache of huggingface_hub, `models--ORG--NAME/snapshots/COMMIT`; None for others."""
    place = "" if folder is None else folder.absolute().parent.parent.name
    found = re.fullmatch(r"models--(.+)", place)
    name = found[1].replace("--", "/") if found else None
    return name if is_hub_id(name) else None
