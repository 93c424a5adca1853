"""Runs damaged cases in forked children, and says what a reader did that it must not do.

A reader may refuse a case with an error of its family (one line, fewer than 1,000 characters) or load it. It must not
raise anything else, crash, hang, take more memory than the limit, touch files outside the folder, start programs, or
give other values when it loads the same files again.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.mutate import Case, damage

SECONDS = 10
"""The most processor time that a reader may take."""
SILENCE = 40
"""Seconds after which a child that says nothing is ended: it waits, or hangs in native code."""
MEMORY = 2 * 2**30
"""Bytes of address space that a child may take beyond what it starts with."""
LONGEST = 1000
BATCH = 200
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Format:
    """A kind of files that the project reads.

    seeds: whole cases by name. read: loads a case that lies in a folder, and returns what can be compared.
    errors: what it may raise. targets: which of the files are damaged.
    light: reading needs no torch. sample: how many cases the tests run. alone: runs only when it is named.
    """

    name: str
    seeds: Callable[[], Mapping[str, Case]]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    targets: Callable[[str], bool] = lambda name: True
    light: bool = False
    sample: int = 50
    alone: bool = False


@dataclass(frozen=True)
class Find:
    """What a reader did that it must not do. key: the same for finds of one cause."""

    format: str
    key: str
    what: str
    where: str
    number: int
    origin: str
    said: str
    case: Case = field(repr=False, default_factory=dict)


@dataclass
class Result:
    """What became of the cases of a format."""

    format: str
    cases: int = 0
    loaded: int = 0
    refused: int = 0
    seconds: float = 0.0
    finds: dict[str, Find] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


class Hang(BaseException):
    """A reader takes too long."""


def make(
    form: Format, seeds: Mapping[str, Case], seed: int, number: int, only: int | None = None
) -> tuple[str, Case, str]:
    """Case `number`: the name of the seed, the damaged files, and how. only: which of its damages to do alone."""
    rng = Random(f"{seed}/{form.name}/{number}")
    origin = rng.choice(sorted(seeds))
    case, said = seeds[origin], []
    targets = tuple(name for name in case if form.targets(name))
    for step in range(rng.choice([1, 1, 1, 2, 3])):
        if only in (None, step):
            case, words = damage(case, targets, Random(f"{seed}/{form.name}/{number}/{step}"))
            said.append(words)
    return origin, case, "; ".join(said)


def run(form: Format, seed: int, work: Path, *, cases: int | None = None, seconds: float | None = None) -> Result:
    """Damage and read until so many cases or seconds are over."""
    seeds = form.seeds()
    result, start, number = Result(form.name), time.monotonic(), 0
    for name, case in seeds.items():  # imports what reading needs, and shows that the seeds are right
        outcome = attempt(form, case, work)
        if not isinstance(outcome, Loaded):
            said = str(outcome.error if isinstance(outcome, Refused) else outcome)
            found = Find(form.name, f"{form.name}: a whole case is refused", said, "-", 0, name, "undamaged", case)
            result.finds[found.key], result.times[found.key] = found, 1
            return result
    put(seeds[min(seeds)], work / "canary")
    seconds = None if seconds is None else max(1.0, seconds - (time.monotonic() - start))
    start = time.monotonic()
    while (cases is None or number < cases) and (seconds is None or time.monotonic() - start < seconds):
        stop = number + BATCH if cases is None else min(cases, number + BATCH)
        left = None if seconds is None else start + seconds

        def made(i: int) -> Case:
            return make(form, seeds, seed, i)[1]

        fresh = []
        for i, outcome in in_child(form, made, range(number, stop), work, left):
            result.cases += 1
            number = i + 1
            if outcome == "loaded":
                result.loaded += 1
            elif outcome == "refused":
                result.refused += 1
            else:
                found = _find(form, seeds, seed, i, outcome)
                result.times[found.key] = result.times.get(found.key, 0) + 1
                if result.times[found.key] == 1:
                    fresh.append(found)
        for found in fresh:
            result.finds[found.key] = _smaller(form, seeds, seed, found, work)
    result.seconds = time.monotonic() - start
    return result


def _find(form: Format, seeds: Mapping[str, Case], seed: int, number: int, outcome: Mapping[str, str]) -> Find:
    origin, case, said = make(form, seeds, seed, number)
    return Find(form.name, outcome["key"], outcome["what"], outcome["where"], number, origin, said, case)


def _smaller(form: Format, seeds: Mapping[str, Case], seed: int, found: Find, work: Path) -> Find:
    """The find with only one of its damages, where that is enough."""
    for step in range(3):
        _, case, said = make(form, seeds, seed, found.number, step)
        if not said:
            break
        for _, outcome in in_child(form, lambda i, case=case: case, [0], work):
            if isinstance(outcome, dict) and outcome["key"] == found.key:
                return dataclasses.replace(found, case=case, said=said)
    return found


# -- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A case that was read."""

    value: Any


@dataclass(frozen=True)
class Refused:
    """A case that was refused as it should be."""

    error: Exception


def attempt(form: Format, case: Case, work: Path) -> Any:
    """Read a case: `Loaded`, `Refused`, or a dict about what went wrong (key, what, where)."""
    folder = work / "case"
    put(case, folder)
    try:
        value = form.read(folder)
    except form.errors as error:
        return _judge(form, error)
    except (Exception, Hang) as error:
        return problem(form, type(error).__name__, error)
    return Loaded(value)


def _judge(form: Format, error: Exception) -> Any:
    text = str(error)
    if "\n" in text or not text.strip() or len(text) >= LONGEST:
        why = "is empty" if not text.strip() else "has several lines" if "\n" in text else f"has {len(text)} characters"
        return problem(form, f"message {why.split()[0]} {why.split()[-1] if 'lines' in why else 'long'}", error, why)
    return Refused(error)


def problem(form: Format, kind: str, error: BaseException, why: str = "") -> dict[str, str]:
    """What went wrong in a reader, with the innermost line of it in the project."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/src/secateur/" in f.filename]
    frames = frames[:1] if isinstance(error, RecursionError) else frames  # where it ends depends on where it begins
    where = f"{frames[-1].filename.split('/src/')[1]}:{frames[-1].lineno}" if frames else "outside secateur"
    place = f"{frames[-1].filename.split('/src/')[1]}:{frames[-1].name}" if frames else "outside"
    text = " ".join(str(error).split())[:160]
    what = f"{type(error).__name__}: {text}" if not why else f"the message of {type(error).__name__} {why}: {text[:80]}"
    kind = f"{kind} {error.kind}" if hasattr(error, "kind") else kind
    return {"key": f"{form.name}: {kind} in {place}", "what": what.encode("ascii", "replace").decode(), "where": where}


def put(case: Case, folder: Path) -> None:
    """Write the files of a case into a folder that holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def same(a: Any, b: Any) -> bool:
    """Whether two loaded values are equal; NaN equals NaN."""
    if hasattr(a, "detach"):
        a, b = a.detach().float().numpy(), b.detach().float().numpy()
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def judge(form: Format, case: Case, work: Path, watch: "Watch") -> str | dict[str, str]:
    """Read a case twice: 'loaded', 'refused', or what went wrong."""
    first = attempt(form, case, work)
    touched = watch.take()
    if touched:
        return {"key": f"{form.name}: {touched[0].split(' ')[0]} outside", "what": touched[0][:160], "where": "-"}
    if isinstance(first, Loaded):
        second = attempt(form, case, work)
        if not isinstance(second, Loaded):
            said = second.error if isinstance(second, Refused) else second["what"]
            return {"key": f"{form.name}: loads once", "what": f"loads, then does not: {str(said)[:100]}", "where": "-"}
        if not same(first.value, second.value):
            return {"key": f"{form.name}: unequal", "what": "two loads give other values", "where": "-"}
    if isinstance(first, dict):
        return first
    return "loaded" if isinstance(first, Loaded) else "refused"


# -- children ---------------------------------------------------------------------------------------------------------


class Watch:
    """Notes what a process touches outside a folder: files, programs, connections, pickles."""

    ALONE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
    CHANGES = (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "shutil.rmtree",
        "os.mkdir",
        "os.symlink",
        "os.link",
        "os.truncate",
    )
    IN_OPEN = 0x20

    def __init__(self, work: Path) -> None:
        self.work = str(work)
        self.seen: list[str] = []
        canary = work / "canary"
        canary.mkdir(exist_ok=True)
        libc = ctypes.CDLL(None)
        self.notify = libc.inotify_init1(os.O_NONBLOCK) if hasattr(libc, "inotify_init1") else -1
        if self.notify >= 0:
            libc.inotify_add_watch(self.notify, str(canary).encode(), self.IN_OPEN)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, str) and writes and not self._inside(path):
                self.seen.append(f"writes {path}")
        elif event in self.CHANGES:
            if (
                isinstance(args[0], str | os.PathLike)
                and args[-1] in (-1, None)
                and not self._inside(os.fspath(args[0]))
            ):
                self.seen.append(f"{event} {os.fspath(args[0])!r}")
        elif event in self.ALONE:
            self.seen.append(f"{event} {args!r}"[:300])

    def _inside(self, path: Any) -> bool:
        full = os.path.abspath(path)
        return full.startswith((self.work + "/case", self.work + "/cache", "/dev/", "/proc/")) or full == self.work

    def take(self) -> list[str]:
        """What was touched since the last call."""
        seen, self.seen = self.seen, []
        if self.notify >= 0:
            with contextlib.suppress(BlockingIOError):
                if os.read(self.notify, 65536):
                    seen.append("reads a file beside its folder")
        return seen


def in_child(
    form: Format, made: Callable[[int], Case], numbers: Sequence[int], work: Path, until: float | None = None
) -> Iterator[tuple[int, str | dict[str, str]]]:
    """The outcome of each case, read in a forked process; after a crash or a hang another process goes on."""
    numbers, at = list(numbers), 0
    while at < len(numbers) and (until is None or time.monotonic() < until):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _serve(form, made, numbers[at:], work, writing, until)
        os.close(writing)
        alive, status = True, None
        try:
            for line in _lines(reading):
                if line is None:
                    alive = False
                    break
                yield numbers[at], json.loads(line)
                at += 1
            status = os.waitpid(child, 0)[1] if alive else None
        finally:  # whoever reads this may stop early
            os.close(reading)
            if status is None:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
        if alive and os.waitstatus_to_exitcode(status) == 0:
            return
        if at < len(numbers):
            yield numbers[at], _died(form, status, work) if alive else _hung(form, work)
            at += 1


def _serve(
    form: Format, made: Callable[[int], Case], numbers: Sequence[int], work: Path, writing: int, until: float | None
) -> None:
    """What a child does: reads cases and writes a line about each; it never returns."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        faulthandler.enable((work / "stack").open("w"), all_threads=False)
        limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, _alarm)
        sys.dont_write_bytecode = True
        tempfile.tempdir = str(work / "cache")
        (work / "cache").mkdir(exist_ok=True)
        watch = Watch(work)
        for number in numbers:
            if until is not None and time.monotonic() > until:
                break
            case = made(number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            outcome = judge(form, case, work, watch)
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writing, json.dumps(outcome).encode() + b"\n")
        code = 0
    except BaseException:
        (work / "stack").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _alarm(number: int, frame: Any) -> None:
    raise Hang(f"no answer in {SECONDS} seconds of processor time")


def _lines(reading: int) -> Iterator[bytes | None]:
    """The lines from a pipe; None when nothing comes for too long."""
    rest = b""
    while True:
        if not select.select([reading], [], [], SILENCE)[0]:
            yield None
            return
        got = os.read(reading, 65536)
        if not got:
            return
        *lines, rest = (rest + got).split(b"\n")
        yield from lines


def _died(form: Format, status: int, work: Path) -> dict[str, str]:
    code = os.waitstatus_to_exitcode(status)
    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
    return {
        "key": f"{form.name}: {name} in {_stack(work)[1]}",
        "what": f"the process died: {name}",
        "where": _stack(work)[0],
    }


def _hung(form: Format, work: Path) -> dict[str, str]:
    return {"key": f"{form.name}: native hang", "what": f"no answer in {SILENCE} seconds", "where": "native"}


def _stack(work: Path) -> tuple[str, str]:
    """file:line and file:function where a dead child was, from what faulthandler wrote."""
    text = (work / "stack").read_text() if (work / "stack").exists() else ""
    found = re.search(r'/src/(secateur/[^"]+)", line (\d+)(?: in (\w+))?', text)
    return (f"{found[1]}:{found[2]}", f"{found[1]}:{found[3]}") if found else (text[-200:] or "native", "native")
