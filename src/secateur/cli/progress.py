"""What a command shows while it works, on standard error: stages, bars with the time that is left, the best so far.

On a terminal the bars move. Elsewhere (a log, a pipe) there are plain lines, of each bar at most one every `EVERY`
seconds. Standard output holds the result alone. Under `torchrun` the first process shows what there is to show.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import cached_property
from typing import IO, Any

from secateur.errors import printable
from secateur.training import ranks

EVERY = 10.0
"""Seconds between two lines of bars where standard error is no terminal."""


class Progress:
    """The progress of one command.

    is_quiet: whether nothing is shown.
    file: where to write; None for standard error. clock: gives seconds.
    """

    def __init__(self, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.is_quiet = not ranks.is_first()
        self._names: Sequence[str] = ()
        self._at = -1
        self._live: Any = None
        self._bars: list[Bar] = []
        self._best: Bar | None = None
        self._last = clock()

    @cached_property
    def console(self) -> Any:
        """What writes; made when something is written, so that `--help` is quick."""
        from rich.console import Console

        return Console(stderr=True) if self.file is None else Console(file=self.file)

    @property
    def is_live(self) -> bool:
        """Whether bars move."""
        return self.console.is_terminal and not self.is_quiet

    def stages(self, *names: str) -> None:
        """Say which stages come, in their order; bars of these names begin the stage."""
        self._names, self._at = names, -1

    def stage(self, name: str) -> None:
        """Begin a stage; one that goes on already goes on."""
        if 0 <= self._at < len(self._names) and self._names[self._at] == name:
            return
        if name in self._names:
            self._begin(self._names.index(name, self._at + 1 if name in self._names[self._at + 1 :] else 0))
        else:
            self._settle()
            self.say(name)

    def track(self, items: Iterable[Any], description: str) -> Iterator[Any]:
        """The items, with a bar."""
        if description in self._names[self._at + 1 :]:
            self._begin(self._names.index(description, self._at + 1))
        with contextlib.closing(self.bar(description, len(items) if isinstance(items, Sized) else None)) as bar:
            for number, item in enumerate(items, 1):
                yield item
                bar.at(number)

    def _begin(self, number: int) -> None:
        """Begin the stage of that number, from 0."""
        self._settle()
        self._at = number
        self.say(f"stage {number + 1} of {len(self._names)}: {self._names[number]}")

    def bar(self, description: str, total: int | None, before: int = 0) -> "Bar":
        """A bar; `close` it at the end. before: steps that were done before, whose time says nothing."""
        return Bar(self, description, total, before)

    def best(self, text: str) -> None:
        """The best so far, in place of what was best before."""
        if self._best is None:
            self._best = self.bar("best so far", None)
        self._best.at(0, text)

    def say(self, text: str) -> None:
        """A line on what is done, above the bars."""
        if not self.is_quiet:
            self.note(text)
            self._last = self.clock()

    def note(self, text: str) -> None:
        """A line that one has to know, above the bars; it is shown in any case."""
        if ranks.is_first():
            self.console.print(printable(text, keep="\n\t"), soft_wrap=True, markup=False, highlight=False)

    def is_due(self) -> bool:
        """Whether it is time for a line of a bar."""
        return not self.is_quiet and not self.is_live and self.clock() - self._last >= EVERY

    def close(self) -> None:
        """End all bars."""
        for bar in list(self._bars):
            bar.close()
        self._best = None

    def _settle(self) -> None:
        """End the bar of the best so far; what was best stays as a line."""
        best, self._best = self._best, None
        if best is not None:
            best.close()
            self.say(f"{best.description}: {best.text}")

    # -- bars on a terminal ---------------------------------------------------------------------------------------

    def shown(self, bar: "Bar") -> Any:
        """Put a bar on the terminal; returns its number there."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._live is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()
        self._bars.append(bar)
        return self._live.add_task(printable(bar.description), total=bar.total, completed=bar.done, text="")

    def moved(self, bar: "Bar", number: Any) -> None:
        """Show how far a bar is."""
        self._live.update(number, completed=bar.done, text=printable(bar.text))

    def gone(self, bar: "Bar", number: Any) -> None:
        """Take a bar off the terminal."""
        self._bars.remove(bar)
        self._live.remove_task(number)
        if not self._bars:
            self._live.stop()
            self._live = None


class Bar:
    """How far something is.

    description: what. total: how many steps it has; None where nobody knows. before: steps that were done before.
    """

    def __init__(self, progress: Progress, description: str, total: int | None, before: int = 0) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.done, self.text, self.before = before, "", before
        self._began = progress.clock()
        self._number = progress.shown(self) if progress.is_live else None

    def at(self, done: int, text: str = "", *, is_due: bool = False) -> None:
        """So many steps are done. text: a result so far. is_due: whether it is worth a line in a log now."""
        self.done, self.text = done, text
        if self._number is not None:
            self.progress.moved(self, self._number)
        elif is_due or self.progress.is_due():
            self.progress.say(self.line())

    def line(self) -> str:
        """The bar as a line of a log, such as `evaluate 12/40: result, 1:05 left`."""
        count = "" if not self.done else f" {self.done}" if self.total is None else f" {self.done}/{self.total}"
        left = f"{minutes(self.left)} left" if self.left is not None else ""
        told = ", ".join(part for part in (self.text, left) if part)
        return f"{self.description}{count}{': ' if told else ''}{told}"

    @property
    def left(self) -> float | None:
        """Seconds that are left, if the other steps take as long as those that are done; None where nobody knows."""
        if self.done <= self.before or self.total is None:
            return None
        return (self.progress.clock() - self._began) / (self.done - self.before) * (self.total - self.done)

    def close(self) -> None:
        """The end of the bar; it may end twice."""
        if self._number is not None:
            self.progress.gone(self, self._number)
            self._number = None


def minutes(seconds: float) -> str:
    """75 -> 1:15."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


# -- that of the command that runs ------------------------------------------------------------------------------------

_current: list[Progress] = []
"""The progress of the command that runs, see `started`."""


@contextlib.contextmanager
def started() -> Iterator[Progress]:
    """The progress of a command, as long as the context lasts."""
    progress = Progress()
    _current.append(progress)
    try:
        yield progress
    finally:
        _current.remove(progress)
        progress.close()


def current() -> Progress:
    """The progress of the command that runs."""
    return _current[-1] if _current else Progress()


def be_quiet(value: Any) -> Any:
    """What --quiet does. value: whether it is given."""
    if value:
        current().is_quiet = True
    return value


def track(items: Iterable[Any], description: str) -> Iterator[Any]:
    """The items, with a bar of the command that runs."""
    return current().track(items, description)


def stage(name: str) -> None:
    """Begin a stage of the command that runs."""
    current().stage(name)


def best(text: str) -> None:
    """The best so far of the command that runs."""
    current().best(text)


def say(text: str) -> None:
    """A line on what the command does; --quiet leaves it out."""
    current().say(text)


def note(text: str) -> None:
    """A line for the person who waits, which --quiet leaves in; from one process of `torchrun`."""
    current().note(text)
