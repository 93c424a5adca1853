"""Every model on every runtime at every shape, timed in turn; the caller makes the artefacts."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy import runner
from secateur.deploy.jobs.results import Bench, BenchInterrupted, Timing, in_words, timed
from secateur.deploy.operator_library import installed_library
from secateur.errors import ModelError, SecateurError

Say = Callable[[str], None]
Shape = tuple[int, int]
"""(batch, length)."""
Maker = Callable[[str, str, Path, Shape], Path]
"""(model, runtime, where to make it, shape) -> the artefact, which lies elsewhere when there is one already."""


def in_turn(
    names: Sequence[str],
    runtimes: Sequence[str],
    batch: Sequence[int],
    length: Sequence[int],
    make: Maker,
    fixed: Callable[[str], bool],
    *,
    threads: int,
    turns: int,
    result: Callable[[list[Timing]], Bench],
    say: Say = lambda text: None,
    loading: Mapping[str, Any] | None = None,
) -> Bench:
    """Timings by runtime, batch, length and model. What a runtime refuses is a row with an `error`.

    result: makes what is returned of the rows.
    fixed: whether a runtime needs an artefact of its own for each shape; else one is made for the largest.
    loading: options for opening the model folders that artefacts of our own point at.

    Raises ModelError for sizes below one, BenchInterrupted with the complete rows when Ctrl-C comes after the first.
    """
    for size in (*batch, *length):
        if size < 1:
            raise ModelError(f"batch and length are at least 1, not {size}")
    timings: list[Timing] = []
    position = {name: i for i, name in enumerate(names)}

    def ordered() -> Bench:
        return result(sorted(timings, key=lambda t: (runtimes.index(t.runtime), t.batch, t.length, position[t.model])))

    try:
        with tempfile.TemporaryDirectory(prefix="secateur-bench-") as work:
            for runtime in runtimes:
                artefacts = _Artefacts(runtime, names, make, Path(work), say, dict(loading or {}))
                for shape in itertools.product(batch, length):
                    if shape[1] != length[0] and not artefacts.take_tokens:
                        continue
                    if fixed(runtime):
                        artefacts.delete()
                    artefacts.make_missing(shape if fixed(runtime) else (max(batch), max(length)))
                    timings += artefacts.time(shape, threads, turns)
                artefacts.delete()
    except KeyboardInterrupt:
        if timings:
            raise BenchInterrupted(ordered()) from None
        raise
    return ordered()


class _Artefacts:
    """The artefacts of all models for one runtime: `made` by model, and the reasons of those `refused`. Those under
    `work`, a folder of this process, are our own."""

    def __init__(
        self, runtime: str, names: Sequence[str], make: Maker, work: Path, say: Say, loading: dict[str, Any]
    ) -> None:
        self.runtime, self.names, self.make, self.work, self.say = runtime, names, make, work, say
        self.loading = loading
        self.take_tokens = True
        """Whether calls have a length, as far as is known: artefacts of images and sounds have none."""
        self.made: dict[str, Path] = {}
        self.refused: dict[str, str] = {}

    def make_missing(self, shape: Shape) -> None:
        """Make what was neither made nor refused."""
        for number, name in enumerate(self.names):
            if name in self.made or name in self.refused:
                continue
            self.say(f"{self.runtime}: {name}")
            try:
                self.made[name] = self.make(name, self.runtime, self.work / f"{self.runtime}-{number}", shape)
            except SecateurError as error:
                self.refused[name] = str(error)

    def time(self, shape: Shape, threads: int, turns: int) -> list[Timing]:
        """One row a model; its length is 0 where no model takes tokens."""
        try:
            self.take_tokens = not self.made or any(runner.takes_tokens(runner.read(f)) for f in self.made.values())
            shape = shape if self.take_tokens else (shape[0], 0)
            timings = [Timing(name, self.runtime, *shape, error=reason) for name, reason in self.refused.items()]
            if self.made:
                self.say(f"{self.runtime}: batch {in_words(*shape)}")
                ours = {name: self.loading for name, folder in self.made.items() if folder.is_relative_to(self.work)}
                rows = runner.measure(self.made, *shape, threads, turns, library=installed_library(), ours=ours)
                timings += timed(rows, self.made, self.runtime, shape)
        except runner.ArtefactError as error:
            raise ModelError(str(error)) from None
        return timings

    def delete(self) -> None:
        """Delete what was made in the working folder, and forget what was refused."""
        for folder in self.made.values():
            if folder.is_relative_to(self.work):
                shutil.rmtree(folder)
        self.made.clear()
        self.refused.clear()
