"""Writes results so that a folder or file appears whole under its name, or not at all.

What lies at that name is replaced only when it was seen there at the start and the user asked for it; what appears
there during a run is kept, and the result lies beside it.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.files import claims
from secateur.files.claims import Claim
from secateur.files.renames import discard, identity, keep_beside, put, shortened, sync, sync_folder

_keeping = [False]
"""Whether `check_output` keeps its claims, see `claims_kept`."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """SecateurError when `path` exists (unless `overwrite`), must not be replaced, or cannot be written.

    Under `claims_kept` the place is claimed from now on.
    """
    path = Path(path)
    if _keeping[0] and not claims.inside_ours(path):
        if claims.absolute(path) not in claims.held:
            claim = _take(path, overwrite=overwrite)
            claim.kept, claim.busy = True, False
            claims.kept.append(claim)
        return
    _examine(path, overwrite=overwrite)
    parent = _nearest_parent(path)
    trial = Claim(claims.absolute(parent / path.name), secrets.token_hex(8)).side("new")
    try:
        trial.mkdir()
    except OSError as error:
        raise _unwritable(path, parent, error) from None
    with contextlib.suppress(OSError):
        trial.rmdir()


@contextlib.contextmanager
def claims_kept() -> Iterator[None]:
    """While the context lasts `check_output` claims the outputs, for what is written to them later."""
    before, _keeping[0] = _keeping[0], True
    try:
        yield
    finally:
        _keeping[0] = before
        if not before:
            claims.release_kept()


@contextlib.contextmanager
def claimed(path: Path, *, overwrite: bool = False) -> Iterator[Claim]:
    """A claim on `path` while the context lasts; temporary folders with its names are cleared at the end.

    Raises SecateurError as `check_output` does, and when another process, or this one, writes there.
    """
    claim: Claim | None = None
    try:
        claim = claims.held.get(claims.absolute(Path(path)))
        if claim is None or claim.busy or claim.pid != os.getpid():
            claim = None
            claim = _take(Path(path), overwrite=overwrite)
        claim.busy = True
        yield claim
    finally:
        if claim is not None:
            _end(claim)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`: it takes that name when the context ends well, and is deleted otherwise.

    Raises SecateurError as `check_output` does; when another process writes there; when something appeared at `path`
    meanwhile, which stays there, while the new folder gets a name beside it.
    """
    path = Path(path)
    if claims.inside_ours(path):
        with _inner_folder(path, overwrite=overwrite) as temporary:
            yield temporary
        return
    with work_beside(path, overwrite=overwrite) as (claim, temporary):
        yield temporary
        sync(temporary)
        finish(claim, temporary, path)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path of the same name in a temporary folder: the file written there takes its place as in `new_folder`."""
    path = Path(path)
    if claims.inside_ours(path):
        yield path
        return
    with work_beside(path, overwrite=overwrite) as (claim, temporary):
        yield temporary / path.name
        sync(temporary)
        finish(claim, temporary / path.name, path)


@contextlib.contextmanager
def work_beside(path: Path, *, overwrite: bool) -> Iterator[tuple[Claim, Path]]:
    """A claim on `path` and an empty temporary folder beside it, which is deleted at the end."""
    with claimed(path, overwrite=overwrite) as claim:
        temporary = claim.side("new")
        temporary.mkdir()
        claims.ours.add(temporary)
        try:
            yield claim, temporary
        finally:
            claims.ours.discard(temporary)


def finish(claim: Claim, fresh: Path, path: Path) -> None:
    """Give a whole result the name of its output; SecateurError, and a name beside it, when something else is there."""
    ready = claim.side("swap")
    os.rename(fresh, ready)
    made = identity(ready)
    try:
        put(ready, claim.path, claim.seen, claim.side("old"), claim.side("done"))
    except FileExistsError:
        kept = keep_beside(ready, claim.path, "new")
        sync_folder(kept.parent)
        how = "changed" if claim.seen else "appeared"
        raise SecateurError(
            f"{path} {how} during this run, so it was left as it is; the result of this run is in {kept}"
        ) from None
    claim.seen = made
    sync_folder(claim.path.parent)
    discard(claim.side("done"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text under a temporary name, then rename."""
    path = Path(path)
    name = f".{claims.stem(path)}"
    inside = claims.inside_ours(path)
    if not inside:
        _clear_abandoned(path.parent, name)
    temporary = path.with_name(f"{name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            _lock(file)
            file.write(text)
            file.flush()
            if not inside:
                os.fsync(file.fileno())
            if os.name == "posix":  # as long as it is locked; other systems rename no open file
                os.replace(temporary, path)
        if os.name != "posix":
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- parts ------------------------------------------------------------------------------------------------------------


def _examine(path: Path, *, overwrite: bool) -> None:
    """What `check_output` finds, after clearing what a killed process left."""
    if not claims.inside_ours(path) and claims.absolute(path) not in claims.held:
        claims.clear_dead(claims.absolute(path))
    if path.exists() and not overwrite:
        raise _exists(path)
    if path.is_symlink() and not path.exists():
        raise SecateurError(f"{path} is a link to {os.readlink(path)}, which does not exist; choose another output")
    if path.is_dir() and (precious := _precious(path)):
        raise SecateurError(f"{path} will not be replaced, for {precious}; choose another output")
    parent = _nearest_parent(path)
    if not parent.is_dir():
        raise SecateurError(f"{path} cannot be written: {parent} is not a folder; choose another output")


def _exists(path: Path) -> SecateurError:
    return SecateurError(f"{path} exists; choose another output or pass --overwrite")


def _unwritable(path: Path, parent: Path, error: OSError) -> SecateurError:
    reason = (error.strerror or str(error)).lower()
    return SecateurError(f"{path} cannot be written: {reason} in {parent}; choose another output")


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


def _take(path: Path, *, overwrite: bool) -> Claim:
    """A claim on an output that may be written; SecateurError otherwise."""
    _examine(path, overwrite=overwrite)
    parent = _nearest_parent(path)
    try:
        claim = claims.take(claims.absolute(path))
    except OSError as error:
        raise _unwritable(path, parent, error) from None
    try:
        if claim.seen and not overwrite:  # a killed run had moved it away
            raise _exists(path)
        return claim
    except BaseException:  # an interrupt too: it is raised again
        claims.release(claim)
        raise


def _end(claim: Claim) -> None:
    """The end of writing: the temporary folders go, and the claim where it is not kept."""
    claim.busy = False
    try:
        claims.clear(claim.path, claim, only=claim.id)
    finally:
        if not claim.kept:
            claims.release(claim)


@contextlib.contextmanager
def _inner_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """`new_folder` in a place that only this process knows: whole or not at all, but without a claim."""
    if path.exists() and not overwrite:
        raise _exists(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{shortened(path.name)}.{secrets.token_hex(4)}")
    temporary.mkdir()
    whole = claims.absolute(temporary)
    claims.ours.add(whole)
    try:
        yield temporary
        discard(path)
        os.rename(temporary, path)
    finally:
        claims.ours.discard(whole)
        discard(temporary)


def _lock(file: Any) -> None:
    """Lock an open file, where the system can; OSError when another process holds it."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _clear_abandoned(folder: Path, name: str) -> None:
    """Delete what killed processes left of `write_json`; they no longer lock it."""
    if os.name != "posix":
        return
    for path in folder.iterdir():
        middle = path.name.removeprefix(f"{name}.").removesuffix(".tmp")
        if path.name == f"{name}.{middle}.tmp" and len(middle) == 16:
            with contextlib.suppress(OSError), path.open() as file:
                _lock(file)
                path.unlink()
