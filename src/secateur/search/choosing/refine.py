"""Refinement: a local search around a candidate on true divergences, with moves that keep the costs.

It accepts only what the same examples show to be better beyond their paired standard error. On a small encoder a looser
rule, and curves scaled to one measurement an axis, gained on search rows and nothing, or worse, on others.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from secateur.deploy.jobs.timing import Say
from secateur.errors import PlanError
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import Inside, allowed_counts, choose, expected, within
from secateur.search.choosing.trial import is_better, key_of
from secateur.search.costs import Cost
from secateur.search.levels import Levels

PROPOSALS = 8
"""Random moves of which the one of least expected loss is measured."""


class Measured(Protocol):
    """What measures candidates, such as a `Trial`; `len` says how many batches there are."""

    def __len__(self) -> int: ...

    def divergence(self, candidate: Candidate, batches: int | None = None) -> float:
        """The mean divergence of the first so many batches."""

    def per_example(self, candidate: Candidate, batches: int | None = None) -> np.ndarray:
        """The divergence of each example of the first so many batches, (examples,)."""


def quiet(text: str) -> None:
    """A `Say` that says nothing."""


@dataclass
class _Search:
    """What the moves of a local search need."""

    levels: Levels
    costs: Sequence[Cost]
    inside: Inside
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.counts = {name: allowed_counts(axis, self.costs) for name, axis in self.levels.axes.items()}

    def axes_of(self, candidate: Candidate) -> list[str]:
        """The axes that the candidate does not drop with their layer, and of which there is a choice."""
        where = {name: self.inside.get(name, ("", -1)) for name in self.counts}
        return [
            name
            for name, counts in self.counts.items()
            if len(counts) > 1 and where[name][1] not in candidate.dropped.get(where[name][0], ())
        ]

    def exchange(self, candidate: Candidate) -> Candidate | None:
        """One axis some allowed counts down, another as far up as the costs then allow; None where none can go."""
        axes = self.axes_of(candidate)
        if len(axes) < 2:
            return None
        down, up = self.rng.choice(len(axes), 2, replace=False)
        smaller = self._at(candidate, axes[down], -self._step(axes[down]))
        if smaller is None:
            return None
        place = self._place(candidate, axes[up])
        for step in range(min(self._step(axes[up]) * 4, len(self.counts[axes[up]]) - 1 - place), 0, -1):
            larger = self._at(smaller, axes[up], step)
            if larger is not None and within(larger, self.costs):
                return larger
        return None

    def layers(self, candidate: Candidate) -> Iterator[Mapping[str, tuple[int, ...]]]:
        """Other sets of dropped layers: one more, one less, or another one instead."""
        for axis, losses in self.levels.layers.items():
            if not any(axis in cost.layers for cost in self.costs):
                continue
            gone = candidate.dropped.get(axis, ())
            free = [i for i in range(len(losses)) if i not in gone and np.isfinite(losses[i])]
            fewer = [tuple(i for i in gone if i != back) for back in gone]
            more = [(*some, new) for some in (gone, *fewer) for new in free if len(some) < len(losses) - 1]
            for layers in (*fewer, *more):
                yield {**candidate.dropped, axis: tuple(sorted(layers))}

    def move(self, candidate: Candidate) -> Candidate | None:
        """A move: of some random exchanges that of least expected loss, or now and then other layers."""
        others = list(self.layers(candidate))
        if others and self.rng.random() < 0.2:
            dropped = others[int(self.rng.integers(len(others)))]
            try:
                return choose(self.levels, self.costs, dropped=dropped, inside=self.inside)
            except PlanError:
                return None
        proposed = [self.exchange(candidate) for _ in range(PROPOSALS)]
        possible = [other for other in proposed if other is not None]
        return min(possible, key=lambda other: expected(self.levels, other), default=None)

    def _step(self, axis: str) -> int:
        """A number of allowed counts: up to a tenth of them, at least one."""
        return 1 + int(self.rng.integers(max(1, len(self.counts[axis]) // 10)))

    def _place(self, candidate: Candidate, axis: str) -> int:
        count = candidate.kept.get(axis, self.levels.axes[axis].size)
        return int(np.searchsorted(self.counts[axis], count))

    def _at(self, candidate: Candidate, axis: str, step: int) -> Candidate | None:
        """The candidate with one axis so many allowed counts away; None where there is no such count."""
        place = self._place(candidate, axis) + step
        if not 0 <= place < len(self.counts[axis]):
            return None
        count = int(self.counts[axis][place])
        kept = {name: n for name, n in candidate.kept.items() if name != axis}
        return replace(candidate, kept=kept if count == self.levels.axes[axis].size else {**kept, axis: count})


def refine(
    candidate: Candidate,
    levels: Levels,
    costs: Sequence[Cost],
    trial: Measured,
    *,
    inside: Inside | None = None,
    seconds: float = 60.0,
    most: int | None = None,
    errors: float = 2.0,
    seed: int = 0,
    say: Say = quiet,
    seen: Callable[[int, float], None] = lambda moves, divergence: None,
) -> Candidate:
    """The best candidate that a local search finds around one, within the same costs.

    A move is measured on a growing number of batches, and given up as soon as it is no better on those so far; it is
    accepted when it is better on all of them beyond `errors` paired standard errors.

    seconds: time to search for. most: the most moves to measure; with it the result depends on the seed alone.
    say: gets a line for each accepted move. seen: gets how many moves were measured, and the divergence of the best
    candidate so far, at the start and after each accepted move.
    """
    search = _Search(levels, costs, inside or {}, np.random.default_rng(seed))
    start, tried, idle = time.perf_counter(), {key_of(candidate)}, 0
    first = trial.divergence(candidate)
    accepted = 0
    seen(0, first)
    while len(tried) - 1 < (most if most is not None else np.inf) and idle < 200:
        if time.perf_counter() - start > seconds:
            break
        other = search.move(candidate)
        if other is None or key_of(other) in tried or not within(other, costs):
            idle += 1
            continue
        idle = 0
        tried.add(key_of(other))
        if _improves(trial, other, candidate, errors):
            candidate, accepted = other, accepted + 1
            seen(len(tried) - 1, trial.divergence(candidate))
            say(
                f"divergence {trial.divergence(candidate):.4g} (was {first:.4g}), {accepted} of {len(tried) - 1} moves "
                "kept"
            )
    return candidate


def _improves(trial: Measured, other: Candidate, candidate: Candidate, errors: float) -> bool:
    """Whether the other candidate is really better, found out on no more batches than it takes."""
    batches = 1
    while batches < len(trial):
        own, before = trial.per_example(other, batches), trial.per_example(candidate, batches)
        if own.mean() >= before.mean():
            return False
        batches *= 2
    return is_better(trial.per_example(other), trial.per_example(candidate), errors)
