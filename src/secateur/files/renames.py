"""Renames that lose nothing: a result takes a name only where nothing lies, or what was seen there before."""

import contextlib
import ctypes
import errno
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of `renameat2` where the system, the file system or a sandbox lacks it."""


def identity(path: Path) -> str:
    """What lies at a path: device, inode and time of change of the file, folder or link; empty for nothing."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}"


def put(fresh: Path, path: Path, seen: str, old: Path, done: Path) -> None:
    """Give `fresh` the name `path`, and what was `seen` there the name `done`.

    old: a name for it in between, where the system cannot exchange two names.

    Raises FileExistsError, and changes nothing, when something else lies at `path`.
    """
    now = identity(path)
    if not now:
        rename_new(fresh, path)
        return
    if now != seen:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if _renameat2(fresh, path, EXCHANGE):
        if identity(fresh) != seen:  # it came between the look and the exchange
            _renameat2(fresh, path, EXCHANGE)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(fresh, done)
        return
    rename_new(path, old)
    try:
        if identity(old) != seen:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        rename_new(fresh, path)
    except BaseException:  # an interrupt too: it is raised again
        with contextlib.suppress(FileExistsError):
            rename_new(old, path)
        raise
    os.rename(old, done)


def rename_new(source: Path, path: Path) -> None:
    """Rename where nothing has the new name; FileExistsError otherwise."""
    if not _renameat2(source, path, NOREPLACE):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(source, path)


def keep_beside(source: Path, path: Path, word: str) -> Path:
    """Give `source` the first free name of `path.WORD-1`, `path.WORD-2` ..., and return it."""
    number = 1
    while True:
        place = path.with_name(f"{shortened(path.name)}.{word}-{number}")
        try:
            rename_new(source, place)
        except FileExistsError:
            number += 1
        else:
            return place


def shortened(name: str) -> str:
    """A file name that leaves room for a suffix."""
    while len(os.fsencode(name)) > 230:
        name = name[:-1]
    return name


def discard(path: Path) -> None:
    """Delete a file, link or folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk; OSError when it does not fit there."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            sync(entry)
        sync_folder(path)
    elif path.is_file():
        with path.open("rb" if os.name == "posix" else "r+b") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@cache
def _system_call() -> Any:
    """`renameat2` of the C library, or None where it has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def _renameat2(source: Path, path: Path, flags: int) -> bool:
    """Rename in one step without replacing, or exchange; False where the system cannot. OSError where it fails."""
    call = _system_call()
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(path), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(path))
