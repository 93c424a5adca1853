"""A schedule of tokens for a wanted share of the work, or for a permitted divergence, found on calibration rows.

The search is greedy. It begins with all tokens and, again and again, lowers the share after one block (and after those
behind it) by a step. It takes the step with the least added divergence for the work that it saves.
"""

from collections.abc import Callable

import numpy as np

from secateur.dynamic.find_sites import Found
from secateur.dynamic.tokens import prunable
from secateur.errors import ModelError
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, Track, divergences_of, silent
from secateur.tasks.base.task import Task
from secateur.token_schedule import TokenSchedule
from secateur.torch.host import TorchHost
from secateur.torch.tokens.install import install

STEP = 10
"""Per cents of the tokens that one step takes away."""
LEAST = 10
"""Per cents that are left after a block at least."""


def find_schedule(
    task: Task,
    host: TorchHost,
    batches: Batches,
    *,
    work: float | None = None,
    divergence: float | None = None,
    found: Found | None = None,
    say: Callable[[str], None] = lambda text: None,
    track: Track = silent,
) -> TokenSchedule:
    """The schedule that was found.

    host: without a schedule. task: of its model. batches: calibration rows; labels are not needed.
    work: the largest share of the work by tokens (`TokenSchedule.work`), above 0 and below 1.
    divergence: the largest mean divergence from the dense model; the last schedule within it is returned.
    say: gets a sentence for each step.

    Raises ModelError where neither or both are given, where the work cannot be reached, and as `prune_tokens` does.
    """
    if (work is None) == (divergence is None):
        raise ModelError("give either the share of work that a schedule may take, or the divergence that it may cause")
    found = prunable(host, found)
    reference = Reference(task, host.model, batches, track)
    trial = _Trial(task, host, batches, found, reference)
    keep = [100] * found.blocks
    while True:
        schedule = TokenSchedule(tuple(keep))
        if work is not None and schedule.work(trial.length) <= work:
            return schedule
        moves = _moves(keep)
        if not moves:
            if work is None:
                return schedule
            raise ModelError(f"no schedule takes {work:g} of the work; the least is {schedule.work(trial.length):.2f}")
        scored = [(trial.divergence(moved), moved) for moved in moves]
        before, start = trial.divergence(keep), schedule.work(trial.length)

        def price(entry: tuple[float, list[int]], before: float = before, start: float = start) -> float:
            saved = start - TokenSchedule(tuple(entry[1])).work(trial.length)
            return max(entry[0] - before, 0.0) / saved

        best, moved = min(scored, key=price)
        if divergence is not None and best > divergence:
            return schedule
        keep = moved
        left = TokenSchedule(tuple(keep)).work(trial.length)
        say(f"tokens kept after each block, %: {', '.join(map(str, keep))}; work {left:.2f}, divergence {best:.4f}")


def _moves(keep: list[int]) -> list[list[int]]:
    """Every way to lower the share after one block that is not the last; those behind it keep no more."""
    moves = []
    for block in range(len(keep) - 1):
        lower = keep[block] - STEP
        if lower >= LEAST:
            moves.append([*keep[:block], *(min(percent, lower) for percent in keep[block:])])
    return moves


class _Trial:
    """The divergence of schedules on the rows, each computed once."""

    def __init__(self, task: Task, host: TorchHost, batches: Batches, found: Found, reference: Reference) -> None:
        self.task, self.batches, self.found, self.reference = task, batches, found, reference
        self.model = host.copy().model
        self.length = max(task.length(feature) for feature in batches.examples.features)
        self._known: dict[tuple[int, ...], float] = {}

    def divergence(self, keep: list[int]) -> float:
        """Mean over rows."""
        key = tuple(keep)
        if key not in self._known:
            install(self.model, TokenSchedule(key), self.found.sites)
            rows = [
                divergences_of(self.task, self.model, self.batches, number, self.reference)
                for number in range(len(self.batches))
            ]
            self._known[key] = float(np.concatenate(rows).mean())
        return self._known[key]
