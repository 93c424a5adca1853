"""What a safetensors file says it holds: names, types, shapes and byte ranges, checked against its length.

Read with plain calls, not mapped.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names of the weights of a checkpoint: one file, or the index of several."""
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors files that torch computes with."""
_LONGEST = 100_000_000
"""Bytes of a header; safetensors takes no longer ones."""


@dataclass(frozen=True)
class Entry:
    """Where the bytes of one tensor lie, and what they are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


def read_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; ModelError when it is damaged: no such header, ranges that leave gaps or
    overlap, that do not fit types and shapes, or that do not end where the file does.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(min(length, size, _LONGEST)))
        header.pop("__metadata__", None)
        found = {name: _entry(file, about, 8 + length) for name, about in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None
    reached = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached or entry.end < entry.begin:
            raise _damaged(file, f"{name} lies at bytes {entry.begin} to {entry.end}, expected from {reached}")
        if entry.dtype in TYPES and entry.bytes != math.prod(entry.shape) * TYPES[entry.dtype].itemsize:
            raise _damaged(file, f"{name} has {entry.bytes} bytes, not {entry.shape} of {entry.dtype}")
        reached = entry.end
    if reached != size:
        raise _damaged(file, f"its tensors end at byte {reached} of {size}")
    return found


def _entry(file: Path, about: Any, start: int) -> Entry:
    begin, end = (start + int(offset) for offset in about["data_offsets"])
    return Entry(file, str(about["dtype"]), tuple(int(n) for n in about["shape"]), begin, end)


def _damaged(file: Path, reason: object) -> ModelError:
    return ModelError(f"{file} is damaged or cut short ({reason}); save or copy it again")
