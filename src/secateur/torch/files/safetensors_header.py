"""The header of a safetensors file: names, types, shapes and byte ranges of tensors, checked against the file's length.

Files are read with plain calls, not memory-mapped.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.schemas.reading import parse

WEIGHTS = "model.safetensors"
"""Name of the weights of a checkpoint in one file."""
INDEX = "model.safetensors.index.json"
"""Name of the index of a checkpoint in several files."""
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
"""Type names of safetensors files -> torch types, without the types that torch does not compute with."""
_LONGEST = 100_000_000
"""The most bytes of a header that safetensors accepts."""
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    file: the file.
    dtype: type name as in the file, a key of `TYPES` where torch computes with it.
    shape: shape of the tensor.
    begin, end: byte range in the file.
    """

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
    """The tensors of a safetensors file.

    Raises:
        ModelError: when the file is damaged: it has no such header, or byte ranges that leave gaps or overlap, do not
            fit types and shapes, or do not end at the end of the file.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = parse(stream.read(min(length, size, _LONGEST)).decode())
        header.pop("__metadata__", None)
        entries = {name: _entry(file, fields, 8 + length) for name, fields in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None
    reached = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached or entry.end < entry.begin:
            raise _damaged(file, f"{name} lies at bytes {entry.begin} to {entry.end}, expected from {reached}")
        if entry.dtype in TYPES and entry.bytes != math.prod(entry.shape) * TYPES[entry.dtype].itemsize:
            raise _damaged(file, f"{name} has {entry.bytes} bytes, not {entry.shape} of {entry.dtype}")
        reached = entry.end
    if reached != size:
        raise _damaged(file, f"its tensors end at byte {reached} of {size}")
    return entries


def _entry(file: Path, fields: Any, start: int) -> Entry:
    shape, (begin, end) = _whole(fields["shape"]), _whole(fields["data_offsets"])
    return Entry(file, str(fields["dtype"]), shape, start + begin, start + end)


def _whole(numbers: Any) -> tuple[int, ...]:
    """A list of whole numbers from 0, as many as a tensor may have dimensions."""
    if not isinstance(numbers, list) or len(numbers) > _MOST_DIMENSIONS:
        raise ValueError(f"{_short(numbers)} is no list of at most {_MOST_DIMENSIONS} numbers")
    wrong = [number for number in numbers if type(number) is not int or number < 0]
    if wrong:
        raise ValueError(f"{_short(wrong[0])} is no size or position")
    return tuple(numbers)


def _damaged(file: Path, reason: object) -> ModelError:
    return ModelError(f"{file} is damaged or cut short ({_short(reason)}); save or copy it again")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
