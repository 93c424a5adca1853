"""Who writes an output: one process, which says so in `.NAME.claim` beside it from its start to its end.

The names of its temporary folders have the random number of its claim: `.NAME.ID.new` is being written, `.NAME.ID.swap`
is whole and about to change places with the earlier output, `.NAME.ID.old` is that where the system cannot exchange two
names, `.NAME.ID.done` is to be deleted. The claim of a killed process is taken over, and its folders are cleared.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from secateur.errors import SecateurError, printable
from secateur.files.renames import discard, identity, keep_beside, rename_new

if TYPE_CHECKING:
    from secateur.schemas.claim import Claim as Record

FORMAT = 1
LONGEST = 150
"""Bytes of an output's name in the names of its temporary folders; a longer one is cut, with a hash."""
PROC = Path("/proc")
logger = logging.getLogger(__name__)


@dataclass
class Claim:
    """An output that this process writes.

    path: the output; absolute, its parents without links.
    id: as in the claim's file.
    seen: what lay at `path` when it was claimed (`renames.identity`).
    made: parents that were made for it.
    pid: this process; a fork of it releases nothing.
    text: what the claim's file holds.
    busy: whether something is being written. kept: whether it is held until `release_kept`.
    """

    path: Path
    id: str
    seen: str = ""
    made: list[Path] = field(default_factory=list)
    pid: int = field(default_factory=os.getpid)
    text: str = ""
    busy: bool = True
    kept: bool = False

    def side(self, word: str) -> Path:
        """A temporary name beside the output."""
        return self.path.with_name(f".{stem(self.path)}.{self.id}.{word}")


held: WeakValueDictionary[Path, Claim] = WeakValueDictionary()
"""The claims of this process by their outputs; one that an interrupt has parted from its writer vanishes."""
kept: list[Claim] = []
"""The claims that are held until `release_kept`."""
ours: set[Path] = set()
"""Folders that only this process knows, in which nothing needs a claim."""


def absolute(path: Path) -> Path:
    """A path whose parents are free of links and dots; the last part may be a link."""
    whole = Path(os.path.abspath(path))
    return Path(os.path.realpath(whole.parent)) / whole.name


def inside_ours(path: Path) -> bool:
    """Whether a path lies in a folder that only this process knows."""
    whole = absolute(path)
    return any(folder == whole or folder in whole.parents for folder in ours)


def stem(path: Path) -> str:
    """The name of an output in the names of its temporary folders."""
    raw = os.fsencode(path.name)
    if len(raw) <= LONGEST:
        return path.name
    return f"{raw[: LONGEST - 20].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def file_of(path: Path) -> Path:
    """The claim's file of an output."""
    return path.with_name(f".{stem(path)}.claim")


# -- taking and releasing ---------------------------------------------------------------------------------------------


def take(path: Path) -> Claim:
    """Claim an output (`absolute`), after clearing what killed processes left there.

    Raises SecateurError, which names the process, when another one writes it; OSError when nothing can be written.
    """
    claim = Claim(path, secrets.token_hex(8), made=[p for p in path.parents if not p.exists()])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            clear(path, refuse_living(path))
            claim.seen = identity(path)
            _write(claim)
        held[path] = claim
        return claim
    except BaseException:  # an interrupt too: it is raised again
        release(claim)
        raise


def release(claim: Claim) -> None:
    """Give up a claim; parents that were made for it and are empty go with it."""
    if claim.pid != os.getpid():
        return
    file = file_of(claim.path)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if claim.text and file.read_text(encoding="utf-8") == claim.text:
            file.unlink()
    if held.get(claim.path) is claim:
        del held[claim.path]
    if not os.path.lexists(claim.path):
        _remove_parents(claim)


def release_kept() -> None:
    """Give up every claim that was kept."""
    while kept:
        release(kept.pop())  # the last one first: the first one made the parents


def clear_dead(path: Path) -> None:
    """Clear what a killed process left of an output, with its claim, and say so; SecateurError when it may be alive."""
    if not file_of(path).exists():
        return
    with _alone(path.parent):
        if dead := refuse_living(path):
            who = printable(f"process {dead.pid} on {dead.host}")
            logger.warning("%s was writing %s and is gone; its unfinished files are cleared", who, path)
            clear(path, dead)
            file_of(path).unlink(missing_ok=True)


def refuse_living(path: Path) -> "Record | None":
    """The claim that a dead process left on an output, or None; SecateurError when its process may be alive."""
    file = file_of(path)
    record = _read(file)
    if record is None:
        return None
    if _alive(record) and not _abandoned(record):
        raise SecateurError(
            f"process {record.pid} on {record.host} is writing {path}; wait for it, choose another output, or delete "
            f"{file} if that process is gone"
        )
    return record


def _write(claim: Claim) -> None:
    """Write a new claim's file; the parent folder is locked, so that a dead claim can be removed before."""
    file = file_of(claim.path)
    file.unlink(missing_ok=True)
    record = {"claim": FORMAT, "host": socket.gethostname(), "pid": claim.pid, "started": _started(claim.pid) or ""}
    claim.text = json.dumps({**record, "id": claim.id, "seen": claim.seen})
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(claim.text)
    except FileExistsError:
        raise SecateurError(f"another process has just begun to write {claim.path}; choose another output") from None
    except OSError:
        file.unlink(missing_ok=True)
        raise


def _read(file: Path) -> "Record | None":
    """The claim in a file; None where there is none, or where it was never written to its end."""
    if not file.exists() or file.stat().st_size == 0:
        return None
    from secateur.schemas import claim, reading  # only where there is a claim: the schemas take long to load

    return reading.read(file, claim.Claim, error=SecateurError, remedy="delete it if nothing writes there")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process takes or clears a claim in a folder while the context lasts, where the system can lock one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system locks no folders
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _remove_parents(claim: Claim) -> None:
    with contextlib.suppress(OSError):
        for parent in claim.made:
            parent.rmdir()


# -- whether a process lives ------------------------------------------------------------------------------------------


def _alive(record: "Record") -> bool:
    """Whether the process of a claim lives, or may live: one on another machine cannot be asked."""
    if record.host != socket.gethostname():
        return True
    boot, space, _ = (*record.started.split("/"), "", "")[:3]
    here_boot, here_space, _ = (*(_started(os.getpid()) or "").split("/"), "", "")[:3]
    if boot and here_boot and boot != here_boot:
        return False  # the machine was started again
    if space != here_space:
        return True  # a container has numbers of its own
    now = _started(record.pid)
    return now is not None and (not now or not record.started or now == record.started)


def _abandoned(record: "Record") -> bool:
    """Whether this very process wrote a claim and knows it no longer: an interrupt came between."""
    here = (socket.gethostname(), os.getpid(), _started(os.getpid()))
    known = {claim.id for claim in held.values()}
    return (record.host, record.pid, record.started) == here and record.id not in known


def _started(pid: int) -> str | None:
    """When a process started, as boot/space/ticks; empty where the system does not tell, None where there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
        state, *rest = text.rpartition(")")[2].split()
        if state in "ZX":  # dead, and not yet waited for
            return None
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink(PROC / 'self/ns/pid')}/{rest[18]}"
    except (OSError, ValueError, IndexError):
        pass
    if os.name != "posix":
        return ""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:  # it belongs to somebody else
        pass
    return ""


# -- what killed processes left ---------------------------------------------------------------------------------------


def clear(path: Path, dead: "Record | Claim | None", only: str | None = None) -> None:
    """Delete the temporary folders beside an output, and put back what was about to be replaced.

    dead: the claim of the process that left them, as far as known. only: the claim's id; None for all.
    What may belong to somebody else gets a visible name.
    """
    pattern = re.compile(rf"\.{re.escape(stem(path))}\.([0-9a-f]{{16}})\.(new|swap|old|done)(\..+)?")
    left: dict[str, dict[str, Path]] = {}
    for name in sorted(os.listdir(path.parent)):
        if (match := pattern.fullmatch(name)) and only in (None, match[1]):
            if match[2] in ("new", "done"):
                discard(path.with_name(name))
            else:
                left.setdefault(match[1], {})[match[2]] = path.with_name(name)
    for id_, places in left.items():
        seen = dead.seen if dead is not None and dead.id == id_ else None
        if "old" in places:
            _settle_old(path, places["old"], seen, replaced="swap" not in places)
            if "swap" in places:
                discard(places["swap"])
        elif seen is not None and (not seen or seen in (identity(places["swap"]), identity(path))):
            discard(places["swap"])  # a result that never got its name, or what it replaced
        else:
            _show(places["swap"], path, "kept")


def _settle_old(path: Path, old: Path, seen: str | None, *, replaced: bool) -> None:
    """Put back the earlier output, or delete it where the new one has its name."""
    if not os.path.lexists(path):
        rename_new(old, path)
        logger.warning("%s is again what it was before the run that was killed", path)
    elif replaced and identity(old) == seen:
        discard(old)
    else:
        _show(old, path, "old")


def _show(hidden: Path, path: Path, word: str) -> None:
    logger.warning("a killed run left what is now %s", keep_beside(hidden, path, word))
