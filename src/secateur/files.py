"""Writes results so that a folder or file appears whole under its name, or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


def check_output(path: Path, *, overwrite: bool) -> None:
    """SecateurError when `path` exists (unless `overwrite`), must not be replaced, or cannot be written."""
    if path.exists() and not overwrite:
        raise SecateurError(f"{path} exists; choose another output or pass --overwrite")
    if path.is_symlink() and not path.exists():
        raise SecateurError(f"{path} is a link to {os.readlink(path)}, which does not exist; choose another output")
    if path.is_dir() and (precious := _precious(path)):
        raise SecateurError(f"{path} will not be replaced, for {precious}; choose another output")
    parent = _nearest_parent(path)
    if not parent.is_dir():
        raise SecateurError(f"{path} cannot be written: {parent} is not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=parent))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SecateurError(f"{path} cannot be written: {reason} in {parent}; choose another output") from None


def _precious(path: Path) -> str | None:
    """Why a folder must not be replaced, or None where it may be."""
    whole = path.resolve()
    for name, folder in (("the working folder", Path.cwd()), ("your home", Path.home())):
        if folder.resolve().is_relative_to(whole):
            return f"it holds {name}"
    return "it is a git repository" if (whole / ".git").exists() else None


def _nearest_parent(path: Path) -> Path:
    """The innermost folder above a path that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`: it takes that name when the context ends well, and is deleted otherwise."""
    path = Path(path)
    check_output(path, overwrite=overwrite)
    missing_parents = [parent for parent in path.absolute().parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / "was")
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            with contextlib.suppress(OSError):
                for parent in missing_parents:
                    parent.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
