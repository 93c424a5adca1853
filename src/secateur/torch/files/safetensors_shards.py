"""Weights of a checkpoint as byte ranges of its safetensors files: read one tensor, write one shard, with checks.

Files are read and written with plain calls, not memory-mapped, so that a process holds only the parts that it reads.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ModelError
from secateur.schemas.model_folder import read_index
from secateur.torch.files.safetensors_header import INDEX, TYPES, Entry, read_entries
from secateur.torch.files.saving import check_folder

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_CHUNK = 1 << 22
"""Bytes that are read or written at once."""


def entries_of(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder by their names in the files.

    Raises:
        ModelError: for a folder that is no model, for damaged or truncated files, for an index that names tensors
            that its files do not hold, and for a tensor that two files hold.
    """
    entries: dict[str, Entry] = {}
    for file in check_folder(folder):
        for name, entry in read_entries(file).items():
            if name in entries:
                raise ModelError(f"{file.name} and {entries[name].file.name} both hold {name}; save the model again")
            entries[name] = entry
    index = folder / INDEX
    if index.is_file():
        for name, file_name in read_index(index).items():
            if name not in entries or entries[name].file.name != file_name:
                raise ModelError(f"{index} says that {file_name} holds {name}, which it does not; copy the model again")
    return entries


def read_tensor(entry: Entry) -> torch.Tensor:
    """A tensor, read into new memory; ModelError for types that torch does not compute with."""
    if entry.dtype not in TYPES:
        raise ModelError(f"{entry.file} holds weights of type {entry.dtype}; convert the model to float32 or bfloat16")
    raw = np.empty(entry.bytes, dtype=np.uint8)
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        read = stream.readinto(raw.data) if raw.size else 0
    dtype = TYPES[entry.dtype]
    if read != entry.bytes or entry.bytes != math.prod(entry.shape) * dtype.itemsize:
        raise ModelError(f"{entry.file} is damaged or cut short; save or copy it again")
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)


def write_shard(path: Path, parts: Mapping[str, torch.Tensor | Entry], workspace: Path, *, flush: bool = True) -> str:
    """Write a safetensors file of tensors, and of byte ranges of other files; returns its SHA-256.

    The file is written in `workspace`, flushed to the disk and then renamed, so that `path` is whole or absent.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, part in parts.items():
        dtype, shape, size = _described(part)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    temporary = workspace / path.name
    with temporary.open("wb") as stream:
        for chunk in (struct.pack("<Q", len(text)), text, *_chunks(parts)):
            digest.update(chunk)
            stream.write(chunk)
        if flush:
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def _described(part: torch.Tensor | Entry) -> tuple[str, tuple[int, ...], int]:
    """Type name, shape and bytes of a part."""
    if isinstance(part, Entry):
        return part.dtype, part.shape, part.bytes
    return _NAMES[part.dtype], tuple(part.shape), part.nbytes


def _chunks(parts: Mapping[str, torch.Tensor | Entry]) -> Iterator[Any]:
    for part in parts.values():
        if isinstance(part, Entry):
            yield from _file_chunks(part.file, part.begin, part.end)
        elif part.numel():
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield from (memoryview(raw[start : start + _CHUNK]) for start in range(0, raw.size, _CHUNK))


def _file_chunks(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(begin)
        while begin < end:
            chunk = stream.read(min(_CHUNK, end - begin))
            if not chunk:
                raise ModelError(f"{file} became shorter while it was read; copy it again")
            begin += len(chunk)
            yield chunk
