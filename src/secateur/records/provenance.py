"""The part of a record that says how a model was made: the command, versions, the machine, the data."""

import datetime
import importlib.metadata
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from secateur._version import __version__
from secateur.deploy import runner
from secateur.schemas.record import DataFile, Provenance
from secateur.schemas.results import Machine

PROGRAM = "secateur"
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
"""Packages on which the numbers of any run depend."""


def provenance_of(
    *,
    seconds: float | None = None,
    seed: int | None = None,
    data: Iterable[DataFile] = (),
    packages: Iterable[str] = (),
) -> Provenance:
    """What is known of this run. packages: distributions whose versions count beside `PACKAGES`."""
    return Provenance(
        command=command_line(sys.argv),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=None if seconds is None else round(seconds, 1),
        seed=seed,
        versions={PROGRAM: __version__, **versions_of((*PACKAGES, *packages))},
        machine=Machine(**runner.machine()),
        data=list(data),
    )


def command_line(arguments: Sequence[str]) -> str:
    """The command that runs, with absolute paths shortened to their last part; empty where it is no `secateur` command.

    arguments: as `sys.argv` holds them.
    """
    program = PurePath(arguments[0]) if arguments else PurePath()
    if PROGRAM not in (program.stem, program.parent.name):
        return ""
    return shlex.join([PROGRAM, *map(_shortened, arguments[1:])])


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version, for those that are installed."""
    found = {}
    for package in dict.fromkeys(packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def data_file(role: str, source: Path | str, rows: int | None = None) -> DataFile:
    """Data that was used; its name is the last part of a path, or the whole id of a data set of the hub.

    role: "training", "calibration", "search", "test". source: a file, a folder or an id.
    """
    path = Path(source)
    name = path.name if path.is_absolute() or path.exists() else str(source)
    try:
        digest = runner.digest(path) if path.is_file() else None
    except OSError:  # the data has been read; that it cannot be read again is no reason to fail
        digest = None
    return DataFile(role=role, name=name, rows=rows, sha256=digest)


def _shortened(argument: str) -> str:
    """An argument without the folders of an absolute path; `--option=PATH` too."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{PurePath(value).name if PurePath(value).is_absolute() else value}"
