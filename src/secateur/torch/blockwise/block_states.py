"""Outputs of blocks for the calibration batches, kept in memory or on disk until the next block has read them."""

import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.torch.files.safetensors_header import read_entries
from secateur.torch.files.safetensors_shards import read_tensor, write_shard


class States:
    """Outputs by stream ("dense" or "pruned"), step and batch: tensors, or tuples, lists and mappings of tensors.

    folder: where they are kept; None: in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._states: dict[str, Any] = {}
        self._crcs: dict[str, int] = {}
        if folder is not None:
            folder.mkdir(exist_ok=True)

    def put(self, stream: str, step: int, batch: int, value: Any) -> None:
        """Keep a value."""
        key = f"{stream}-{step}-{batch}"
        tensors: list[torch.Tensor] = []
        shape = _flattened(value, tensors)
        if self.folder is None:
            self._states[key] = (shape, [t.detach().clone() for t in tensors])
            return
        parts = {str(i): t.detach() for i, t in enumerate(tensors)}
        path = self.folder / f"{key}.safetensors"
        write_shard(path, parts, self.folder.parent, flush=False)
        self._states[key] = shape
        self._crcs.pop(key, None)

    def get(self, stream: str, step: int, batch: int) -> Any:
        """The value that was kept."""
        key = f"{stream}-{step}-{batch}"
        if self.folder is None:
            shape, tensors = self._states[key]
            return _restored(shape, iter(tensors))
        entries = read_entries(self.folder / f"{key}.safetensors")
        return _restored(self._states[key], iter([read_tensor(entries[str(i)]) for i in range(len(entries))]))

    def drop(self, stream: str, step: int) -> None:
        """Forget all batches of one step."""
        for key in [k for k in self._states if k.startswith(f"{stream}-{step}-")]:
            del self._states[key]
            self._crcs.pop(key, None)
            if self.folder is not None:
                (self.folder / f"{key}.safetensors").unlink(missing_ok=True)

    def record(self, without: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
        """What is on disk, for `restore`: key -> [structure, CRC-32 of the file]; empty for states in memory.

        without: (stream, step) that are about to be dropped, and so are not in the record.
        """
        if self.folder is None:
            return {}
        gone = tuple(f"{stream}-{step}-" for stream, step in without)
        kept = {key: shape for key, shape in self._states.items() if not key.startswith(gone)}
        for key in kept.keys() - self._crcs.keys():  # each file is read once, however often there is a record
            self._crcs[key] = _crc(self.folder / f"{key}.safetensors")
        return {key: [shape, self._crcs[key]] for key, shape in kept.items()}

    def has(self, stream: str, step: int, batches: int) -> bool:
        """Whether all batches of one step are there."""
        return all(f"{stream}-{step}-{batch}" in self._states for batch in range(batches))

    def restore(self, record: Mapping[str, Any]) -> bool:
        """Take over the states that an earlier process left on disk; if one is damaged, delete all and return False."""
        self.clear(set(record))
        if self.folder is None or not record:
            return False
        for key, (shape, crc) in record.items():
            path = self.folder / f"{key}.safetensors"
            if not path.is_file() or _crc(path) != crc:
                self._states.clear()
                self._crcs.clear()
                self.clear(set())
                return False
            self._states[key], self._crcs[key] = shape, crc
        return True

    def clear(self, keep: set[str]) -> None:
        """Delete all files but those of the keys `keep`."""
        for path in self.folder.iterdir() if self.folder is not None else ():
            if path.stem not in keep:
                path.unlink()


def _crc(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _flattened(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The structure of a value as JSON; its tensors are appended to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return "tensor"
    if value is None or isinstance(value, bool | int | float):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"mapping": {key: _flattened(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_flattened(item, tensors) for item in value]}
    raise ModelError(f"a layer returns a {type(value).__name__}, which cannot be kept between layers")


def _restored(shape: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The inverse of `_flattened`."""
    if shape == "tensor":
        return next(tensors)
    ((kind, content),) = shape.items()
    if kind == "value":
        return content
    if kind == "mapping":
        return {key: _restored(item, tensors) for key, item in content.items()}
    items = [_restored(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
