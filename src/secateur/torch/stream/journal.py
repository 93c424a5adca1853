"""The journal of a long run: which blocks are finished, and with which settings, so that a killed run can be continued.

Beside the output is a working folder `.NAME.partial` with the journal, the finished shards (`result/`) and the
calibration states (`states/`). A block is finished when the journal says so, which is written only after the files of
the block are whole. At the end `result/` takes the name of the output.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import ModelError, SecateurError
from secateur.files import Claim, check_output, claimed, write_json
from secateur.files.claims import absolute, ours
from secateur.files.renames import identity, keep_beside, put, sync
from secateur.schemas.journal import JournalFile
from secateur.schemas.reading import check, read_json

FORMAT = 1


@dataclass
class Journal:
    """The state of a run.

    identity: everything that decides the bits of the result.
    settings: choices that must not change during a run (batch size, threads), and the sparsity of each weight where
        the model itself was read to find it.
    blocks: records of the finished blocks, in order.
    states: see `States.record`.
    distilled: the loss before and after distillation, once its files are whole.
    finished: whether only the working folder is left to be removed.
    """

    identity: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)
    distilled: list[float] | None = None
    finished: bool = False


class Workspace:
    """The working folder of a run.

    journal: a new one, or that of the run that was interrupted.
    resumed: whether it is that of an interrupted run.
    """

    def __init__(self, output: Path, journal: Journal, claim: Claim) -> None:
        self.output = output
        self.claim = claim
        self.folder = partial_folder(output)
        self.result = self.folder / "result"
        self.tuned = self.folder / "tuned"
        self.journal = journal
        self.resumed = False

    def commit(self) -> None:
        """Write the journal: from now on, a run that is continued starts after its last block."""
        write_json(self.folder / "journal.json", {"format": FORMAT, **vars(self.journal)})

    def tidy(self) -> None:
        """Delete what a killed process left incomplete."""
        if self.journal.distilled is None:
            shutil.rmtree(self.tuned, ignore_errors=True)
        else:
            self.promote()
        done = {block["file"] for block in self.journal.blocks}
        for path in self.result.iterdir():
            if path.name not in done:
                path.unlink()
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in ("journal.json", "lock"):
                path.unlink()

    def promote(self) -> None:
        """Replace the files in `result/` with those of distillation in `tuned/`."""
        if self.tuned.is_dir():
            for path in sorted(self.tuned.iterdir()):
                os.replace(path, self.result / path.name)
            self.tuned.rmdir()

    def finish(self) -> None:
        """Give the result its name and remove the working folder.

        Raises SecateurError, and keeps the result beside, when something appeared at its place during the run.
        """
        self.journal.finished = True
        self.commit()
        kept = self._place() if self.result.exists() else None
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        for name in ("placed", "lock", "journal.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()
        if kept is not None:
            raise SecateurError(
                f"{self.output} appeared or changed during this run, so it was left as it is; the result of this run "
                f"is in {kept}"
            )

    def _place(self) -> Path | None:
        """Let the result and what was at its place change names; where the result is kept if that cannot be.

        The file `placed` says which folder is the result and what it replaces, so that a run that is killed between
        the two renames knows which is which.
        """
        note = self.folder / "placed"
        made, seen = (*(note.read_text(encoding="utf-8") if note.exists() else "").split("\n"), "")[:2]
        if made and identity(self.output) == made:  # it was killed after the exchange
            if seen and identity(self.result) != seen:
                keep_beside(self.result, self.output, "kept")
            return None
        sync(self.result)
        note.write_text(f"{identity(self.result)}\n{self.claim.seen}", encoding="utf-8")
        sync(note)
        try:
            put(self.result, self.output, self.claim.seen, self.folder / "old", self.folder / "done")
        except FileExistsError:
            return keep_beside(self.result, self.output, "new")
        return None


def earlier(output: Path, *, overwrite: bool = False) -> Journal | None:
    """The journal of an interrupted run that writes `output`, or None; SecateurError where `output` exists."""
    folder = partial_folder(output.absolute())
    before = _read(folder / "journal.json")
    if before is None:
        _sweep(folder)
        check_output(output, overwrite=overwrite)
    elif output.exists() and not before.finished and not overwrite:
        raise SecateurError(f"{output} exists; choose another output or pass --overwrite")
    return before


def _sweep(folder: Path) -> None:
    """Remove a working folder without a journal: a process was killed at its beginning, or at its very end."""
    with contextlib.suppress(OSError), (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "lock").unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def partial_folder(output: Path) -> Path:
    """The working folder of a run that writes `output`."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def workspace(output: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Workspace]:
    """The working folder of a run that writes `output`, locked while the context lasts.

    Raises SecateurError when `output` exists (unless `overwrite`, or when this very run wrote it), when another process
    works there, and when the unfinished run there has another identity.
    """
    output = Path(output).absolute()
    before = earlier(output, overwrite=overwrite)
    with claimed(output, overwrite=True) as claim:  # `earlier` has refused what must not be replaced
        work = Workspace(output, Journal(dict(identity)), claim)
        if not overwrite:
            claim.seen = ""  # whatever is there was not to be replaced
        work.folder.mkdir(parents=True, exist_ok=True)
        ours.add(absolute(work.folder))
        try:
            with _locked(work, before):
                yield work
        finally:
            ours.discard(absolute(work.folder))


@contextlib.contextmanager
def _locked(work: Workspace, before: Journal | None) -> Iterator[None]:
    """The lock of a working folder, and the journal of the run that is continued there."""
    with (work.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SecateurError(
                f"another process is writing {work.output}; wait for it, or choose another output"
            ) from None
        if before is not None:
            _check(work.folder, before.identity, json.loads(json.dumps(work.journal.identity)))
            work.journal = before
            work.resumed = True
        if not work.journal.finished:
            work.result.mkdir(exist_ok=True)
            work.tidy()
        try:
            yield
        except BaseException as error:  # an interrupt too; whatever it is, it is raised again
            surveyed = "sparsity" in work.journal.settings and not isinstance(error, SecateurError)
            if not (work.journal.blocks or work.journal.states or surveyed):
                shutil.rmtree(work.folder, ignore_errors=True)
            raise


def _read(path: Path) -> Journal | None:
    """The journal in a file, or None where there is no file; ModelError where it is damaged."""
    remedy = f"delete {path.parent} to start over"
    if not path.exists():
        return None
    data = read_json(path, remedy=remedy, infinite=True)
    if data.get("format") != FORMAT:
        raise ModelError(f"{path} cannot be read (another version of secateur wrote it); {remedy}")
    check(data, JournalFile, str(path), remedy=remedy)
    return Journal(**{name: value for name, value in data.items() if name != "format"})


def _check(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """SecateurError, with the first difference, when two identities differ."""
    for part in dict.fromkeys([*before, *now]):
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            name = next(key for key in dict.fromkeys([*old, *new]) if old.get(key, ...) != new.get(key, ...))
            what = f"{part} {name} {_short(old.get(name))}, now it is {_short(new.get(name))}"
        else:
            what = f"another {part}"
        raise SecateurError(
            f"an unfinished run lies in {folder}, started with {what}; continue it as it was started, or delete that "
            "folder to start over"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
