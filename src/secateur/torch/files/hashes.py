"""The SHA-256 of every file of a saved folder: written beside them, compared on request before a model is opened."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from secateur.card.write import NAME as CARD
from secateur.errors import ModelError, shown
from secateur.files import write_json
from secateur.record import NAME as RECORD
from secateur.record import write_record
from secateur.schemas import reading
from secateur.schemas.hashes import Hashes
from secateur.schemas.model_folder import REMEDY
from secateur.schemas.record import Record

HASHES = "secateur-hashes.json"
FORMAT = 1


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_hashes(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the hashes of all files that a folder holds, but of its card, which people edit.

    known: hashes that were computed while files were written, by the names of the files.
    """
    known = known or {}
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path not in (folder / HASHES, folder / CARD)
    )
    names = {path.relative_to(folder).as_posix(): path for path in files}
    hashes = {name: known.get(name) or file_hash(path) for name, path in names.items()}
    write_json(folder / HASHES, {"format": FORMAT, "sha256": hashes})


def add_record(record: Record, folder: Path) -> None:
    """Write the record of the model in a folder, and its hash among those of the other files where these are noted."""
    write_record(record, folder)
    path = folder / HASHES
    if path.is_file():
        known = reading.read(path, Hashes, remedy=REMEDY).sha256
        hashes = {**known, RECORD: file_hash(folder / RECORD)}
        write_json(path, {"format": FORMAT, "sha256": dict(sorted(hashes.items()))})


def check_hashes(folder: Path) -> frozenset[str]:
    """Compare the files of a folder with the hashes that were written with them; returns the names of these files.

    Raises ModelError for a folder without hashes, which earlier versions and other programs save, and for a file that
    is missing or has changed.
    """
    path = folder / HASHES
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {HASHES}, so nobody can say whether its files have changed; save the model again with "
            "this version, or leave out --check"
        )
    hashes = reading.read(path, Hashes, remedy=REMEDY).sha256
    for name, expected in hashes.items():
        _check_name(path, name)
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{folder} lacks {name}, which was saved with it; {REMEDY}")
        if file_hash(file) != expected:
            raise ModelError(f"{folder} has changed: {name} is not the file that was saved; {REMEDY}")
    return frozenset(hashes)


def _check_name(source: Path, name: str) -> None:
    """ModelError for a name that leads out of the folder, or that no file can have."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if outside or not path.parts or not name.isprintable():
        raise ModelError(f"{source} points outside its folder, to {shown(name)}; it is not to be trusted")
