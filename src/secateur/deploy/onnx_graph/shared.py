"""Weights that two ONNX programs have in common, stored once: the second reads them from the file of the first."""

import hashlib
from pathlib import Path
from typing import Any

from secateur.deploy.target import Written

_Place = tuple[int, int]
"""Offset and length in bytes."""


def share(written: dict[str, Written], folder: Path, owner: str, other: str) -> dict[str, Written]:
    """The graphs with new files of `other`, whose weights now lie in the file of `owner` where they lie there too.

    Weights are the same where their bytes are; names do not count. What only `other` has stays in its own file.
    """
    import onnx

    programs = {name: onnx.load(folder / written[name].files[0], load_external_data=False) for name in (owner, other)}
    if len(written[owner].files) < 2 or len(written[other].files) < 2:
        return written  # weights lie in the programs themselves, where they are small
    (program, kept), (changed, own) = written[owner].files, written[other].files
    known = {_digest(folder / kept, place): place for _, place in _external(programs[owner])}
    left = bytearray()
    moved: list[tuple[Any, str, _Place]] = []
    for tensor, place in _external(programs[other]):
        at = known.get(_digest(folder / own, place))
        if at is None:
            moved.append((tensor, own, (len(left), place[1])))
            left += _read(folder / own, place)
            left += bytes(-len(left) % 4096)  # so that the runtime can map it
        else:
            moved.append((tensor, kept, at))
    for tensor, file, (offset, length) in moved:
        del tensor.external_data[:]
        for key, value in (("location", file), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    (folder / own).unlink()
    if left:
        (folder / own).write_bytes(left)
    (folder / changed).write_bytes(programs[other].SerializeToString())
    files = [changed, kept, *([own] if left else [])]
    return {
        **written,
        owner: Written([program, kept], written[owner].outputs),
        other: Written(files, written[other].outputs),
    }


def _external(program: Any) -> list[tuple[Any, _Place]]:
    """The weights of a program that lie beside it, with their places."""
    found = []
    for tensor in program.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in entries:
            found.append((tensor, (int(entries.get("offset", 0)), int(entries["length"]))))
    return found


def _read(path: Path, place: _Place) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _digest(path: Path, place: _Place) -> bytes:
    return hashlib.sha256(_read(path, place)).digest()
