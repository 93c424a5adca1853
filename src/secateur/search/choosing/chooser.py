"""Chooser: from the curves of a model to the candidate within some costs that is nearest to the dense model."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.check import verify
from secateur.cost import layer_of_axes
from secateur.deploy.jobs.timing import Say
from secateur.metrics.evaluation import compare
from secateur.plan import Plan
from secateur.search.build import RIDGES, Cache, plan_of
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import choose, uniform
from secateur.search.choosing.layers import with_layers
from secateur.search.choosing.refine import refine
from secateur.search.choosing.trial import Trial, best_of, key_of
from secateur.search.costs import Cost
from secateur.search.heal import short_heal
from secateur.search.levels import METHODS, layers_of, levels_of
from secateur.search.rows import Rows, few_batches
from secateur.search.stored import collected
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost

HOPELESS, SHORT = 3.0, 30
"""Finalists are trained for so many steps before they are compared, unless they diverge this many times as much."""


@dataclass(frozen=True)
class Settings:
    """How a search goes about it.

    heal_seconds: the most that healing takes; 0 for none. search_seconds: the most that the local search takes.
    seed: of the local search and of healing.
    save_options: for `TorchHost.save`.
    """

    heal_seconds: float = 1800.0
    search_seconds: float = 60.0
    seed: int = 0
    save_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A candidate with what makes a plan of it.

    method: what ordered the units. ridge: of the closed form. divergence: on the search rows.
    trace: of a local search that ended here, (moves measured, least divergence so far) after each accepted move.
    """

    candidate: Candidate
    method: str
    ridge: float
    divergence: float
    trace: tuple[tuple[int, float], ...] = ()


class Chooser:
    """The dense model with the statistics and levels of its axes, and trials of candidates on the search rows.

    work: folder of the statistics.
    """

    def __init__(
        self,
        host: TorchHost,
        task: Task,
        rows: Rows,
        work: Path,
        settings: Settings,
        *,
        by_divergence: bool = False,
        track: Track = silent,
        say: Say = lambda text: None,
        stage: Say = lambda name: None,
        best: Say = lambda text: None,
    ) -> None:
        self.host, self.task, self.rows = host, task, rows
        self.work, self.settings, self.track, self.say = work, settings, track, say
        self.stage, self.best = stage, best
        self.by_divergence = by_divergence
        self.inside = layer_of_axes(host.layout)
        self.seconds: dict[str, float] = {}
        self.few = few_batches(task, rows.search)
        self.ridges: dict[str, float] = {}
        self.trials: dict[tuple[str, float], Trial] = {}
        self._refitted: Cache = {}
        with self.timed("dense model"):
            self.reference = Reference(task, host.model, rows.search, track)
        with self.timed("statistics"):
            self.stats = collected(
                host, task, rows.calibration, work, weights=self.watched(), seed=settings.seed, track=track
            )
        with self.timed("levels"):
            self.levels = {name: levels_of(host, self.stats, name) for name in METHODS}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Shows a stage, and adds the seconds that the context lasts to those of the stage."""
        self.stage(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def watched(self) -> Sequence[str]:
        """The weights whose curvature is collected, beside those that read an axis."""
        return ()

    def trial(self, method: str, ridge: float) -> Trial:
        """Measures candidates by one method and ridge."""
        key = (method, ridge)
        if key not in self.trials:
            self.trials[key] = Trial(
                self.host,
                self.task,
                self.rows.search,
                lambda candidate: self.plan_of(candidate, method, ridge),
                reference=self.reference,
                seed=self.settings.seed,
            )
        return self.trials[key]

    def plan_of(self, candidate: Candidate, method: str, ridge: float) -> Plan:
        """The plan of a candidate, with the weights that make up for what goes."""
        return plan_of(self.host, self.levels[method], self.stats, candidate, ridge, cache=self._refitted)

    def chosen(self, costs: Sequence[Cost]) -> Chosen:
        """The best candidate within the costs by true divergence; PlanError when the bounds cannot be reached."""
        return self.finalists(costs)[0]

    def finalists(self, costs: Sequence[Cost]) -> list[Chosen]:
        """The best candidates within the costs, by true divergence: of both orders, several ridges, uniform sizes (as
        curves may be wrong), and one from which whole layers go.

        Raises PlanError when the bounds cannot be reached.
        """
        with self.timed("choice"):
            found = [self._with_ridge(choose(self.levels[m], costs, inside=self.inside), m) for m in METHODS]
            if len(costs) == 1:
                found.append(self._with_ridge(uniform(self.levels[METHODS[0]], costs[0]), METHODS[0]))
            found.sort(key=lambda one: one.divergence)
            found.append(self._with_layers(costs, found[0]))
            different = {key_of(one.candidate): one for one in reversed(found)}
            return sorted(different.values(), key=lambda one: one.divergence)

    def ranked(self, costs: Sequence[Cost], wanted: float | None = None) -> Chosen:
        """The best of the finalists, after a short training of each where the result will be trained: rankings flip.

        wanted: the drop up to which a model is not trained; None to train in any case. A finalist that training makes
        worse counts as it is; those of more than `HOPELESS` times the least divergence are left out.
        """
        found = self.finalists(costs)
        found = [one for one in found if one.divergence <= HOPELESS * found[0].divergence]
        if self.settings.heal_seconds <= 0 or len(found) == 1:
            return found[0]
        if wanted is not None and self.lost(found[0]) <= wanted:
            return found[0]
        with self.timed("ranking"):
            hosts = [self.cut(one)[0] for one in found]
            after = short_heal(
                hosts,
                self.host,
                self.task,
                self.rows,
                steps=SHORT,
                seed=self.settings.seed,
                reference=self.reference,
            )
        for one, divergence in zip(found, after, strict=True):
            self.say(f"{one.method}: divergence {one.divergence:.4g}, after {SHORT} steps of healing {divergence:.4g}")
        return found[int(np.argmin([min(one.divergence, d) for one, d in zip(found, after, strict=True)]))]

    def _with_ridge(self, candidate: Candidate, method: str) -> Chosen:
        """The candidate with the ridge that was best for the first candidate of the method: it follows from how much
        data there is, and each ridge has to be solved for at every size.
        """
        if method not in self.ridges:
            self.ridges[method] = min(
                RIDGES, key=lambda ridge: self.trial(method, ridge).divergence(candidate, self.few)
            )
        ridge = self.ridges[method]
        return Chosen(candidate, method, ridge, self.trial(method, ridge).divergence(candidate))

    def _with_layers(self, costs: Sequence[Cost], best: Chosen) -> Chosen:
        """A candidate without whole layers, as many as diverge least, by the method and ridge of `best`."""
        if not any(cost.layers for cost in costs):
            return best
        levels, trial = self.levels[best.method], self.trial(best.method, best.ridge)

        def rough(candidate: Candidate) -> float:
            return trial.divergence(candidate, self.few)

        if not levels.layers:
            measured = layers_of(self.host.layout, lambda gone: rough(Candidate(dropped=gone)))
            levels = self.levels[best.method] = replace(levels, layers=measured)
        tried = with_layers(levels, costs, rough, inside=self.inside)
        winner = best_of(trial, [one for one in tried if one.dropped] or [best.candidate])
        return replace(best, candidate=winner, divergence=trial.divergence(winner))

    def refined(self, chosen: Chosen, costs: Sequence[Cost]) -> Chosen:
        """The candidate after a local search, where others really diverge less."""
        trace: list[tuple[int, float]] = []
        with self.timed("search"):
            trial = self.trial(chosen.method, chosen.ridge)
            better = refine(
                chosen.candidate,
                self.levels[chosen.method],
                costs,
                trial,
                inside=self.inside,
                seconds=self.settings.search_seconds,
                seed=self.settings.seed,
                say=self.best,
                seen=lambda moves, divergence: trace.append((moves, divergence)),
            )
            return replace(chosen, candidate=better, divergence=trial.divergence(better), trace=tuple(trace))

    def cut(self, chosen: Chosen) -> tuple[TorchHost, Plan]:
        """The smaller model and its plan, after the masked and the shrunk model were found equal."""
        plan = self.plan_of(chosen.candidate, chosen.method, chosen.ridge)
        verify(self.host, plan, self.rows.search)
        small = self.host.copy()
        small.resize(plan)
        return small, plan

    def lost(self, chosen: Chosen) -> float:
        """What a choice loses on the search rows: the drop of the main metric, or the divergence."""
        if self.by_divergence:
            return chosen.divergence
        with self.trial(chosen.method, chosen.ridge).written(chosen.candidate) as model:
            found = evaluate(self.task, model.model, self.rows.search, self.reference)
        return compare(self.reference.evaluation(), found).drop
