"""A saved model opened again: whether it gives the same numbers, and what its files weigh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.check import check_reloaded
from secateur.plan import MASKS_NAME
from secateur.torch.files.safetensors_header import read_entries
from secateur.torch.files.saving import load
from secateur.torch.files.zero_packing import plain_name
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model


def reload_gap(host: TorchHost, folder: Path, batch: Any, fresh: nn.Module | None = None) -> float:
    """0.0, the difference between a model in memory and its folder; ModelError unless both give the same numbers."""
    again = load_model(folder) if fresh is None else load(folder, fresh)
    return check_reloaded(host.outputs(batch), TorchHost.untraced(again.eval()).outputs(batch))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def tensor_bytes(folder: Path, names: Sequence[str]) -> int:
    """Bytes of the named parameters in the safetensors files of a folder, packed parameters included."""
    total, wanted = 0, set(names)
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name != MASKS_NAME:
            total += sum(entry.bytes for key, entry in read_entries(path).items() if plain_name(key) in wanted)
    return total
