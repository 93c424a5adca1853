"""Every model on every runtime at every shape, timed in turn; where artefacts come from is the caller's matter."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from secateur.deploy import runner
from secateur.deploy.jobs.results import Timing, timed
from secateur.errors import ModelError, SecateurError

Say = Callable[[str], None]
Maker = Callable[[str, str, Path, tuple[int, int]], Path]
"""Model, runtime, where to make it, (batch, length) -> the artefact; elsewhere when there is one already."""


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
    say: Say = lambda text: None,
) -> list[Timing]:
    """Timings by runtime, batch, length and model. What a runtime refuses is a row with an `error`.

    fixed: whether a runtime needs an artefact of its own for each shape; else one is made for the largest.

    Raises ModelError for sizes below one.
    """
    for value in (*batch, *length):
        if value < 1:
            raise ModelError(f"batch and length are at least 1, not {value}")
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as work:
        for runtime in runtimes:
            kept: dict[str, Path] = {}
            refused: dict[str, str] = {}
            for shape in [(b, n) for b in batch for n in length]:
                if fixed(runtime):
                    _delete(kept, Path(work))
                    refused.clear()
                for name in names:
                    if name in kept or name in refused:
                        continue
                    say(f"{runtime}: {name}")
                    place = Path(work) / f"{runtime}-{names.index(name)}"
                    try:
                        kept[name] = make(name, runtime, place, shape if fixed(runtime) else (max(batch), max(length)))
                    except SecateurError as error:
                        refused[name] = str(error)
                timings += [Timing(name, runtime, *shape, error=said) for name, said in refused.items()]
                if kept:
                    say(f"{runtime}: batch {shape[0]} x {shape[1]}")
                    try:
                        timings += timed(runner.measure(kept, *shape, threads, turns), kept, runtime, shape)
                    except runner.ArtefactError as error:
                        raise ModelError(str(error)) from None
            _delete(kept, Path(work))
    order = {name: i for i, name in enumerate(names)}
    return sorted(timings, key=lambda t: (runtimes.index(t.runtime), t.batch, t.length, order[t.model]))


def _delete(kept: dict[str, Path], work: Path) -> None:
    """Delete the artefacts that were made in `work`."""
    for place in kept.values():
        if place.is_relative_to(work):
            shutil.rmtree(place)
    kept.clear()
