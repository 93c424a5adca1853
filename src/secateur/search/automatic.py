"""automatic: from a target to a smaller model that was measured, or to a sentence that says what can be reached."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.search.points import Found
from secateur.search.rows import Rows
from secateur.search.target import Target
from secateur.tasks.base.evaluate import Track, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost

MISSED = 0.03
"""A result is measured this close to what was asked, or the cost is corrected and the sizes are chosen again."""
CORRECTIONS = 3
LADDER = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Speed-ups that are tried one after the other where only a drop is asked for."""

Say = Callable[[str], None]


def automatic(
    host: TorchHost,
    task: Task,
    target: Target,
    rows: Rows,
    output: Path | str | None = None,
    *,
    frontier: Sequence[float] = (),
    heal_seconds: float = 1800.0,
    search_seconds: float = 60.0,
    seed: int = 0,
    work: Path | str | None = None,
    overwrite: bool = False,
    save_options: Mapping[str, Any] | None = None,
    track: Track = silent,
    say: Say = lambda text: None,
) -> Found:
    """Prune a model until it is as fast or small as the target says, with the least loss of quality, and measure both.

    host: the dense model, which stays as it is.
    rows: calibration, search and test rows, which share no row.
    output: folder to write the result to, with the artefact of the runtime inside; None to write nothing.
    frontier: speed-ups to reach one after the other instead; each becomes a folder inside `output`.
    heal_seconds: the most that training with the dense model as teacher takes; 0 for none.
    search_seconds: the most that the local search on true divergence takes.
    work: folder that keeps finished stages, so that a killed run goes on; a temporary one when left out.

    Returns what was found. Where the target is missed nothing is written, unless the target asks for the `closest`.

    Raises PlanError for a target that no choice of sizes reaches, VerifyError and ModelError as `secateur.verify` and
    reloading do, DeployError for a runtime that is not there.
    """
    with _folder(work) as place:
        search = Search(host, task, target, rows, place, heal_seconds, search_seconds, seed, track, say)
        search.save_options = dict(save_options or {})
        search.prepare()
        if frontier:
            found = search.along(frontier)
        elif target.limits:
            found = search.reach()
        else:
            found = search.fastest()
        found = replace(found, seconds=dict(search.seconds))
        return search.written(found, None if output is None else Path(output), overwrite=overwrite)
