"""Stages of a search, each done once: statistics and levels, a choice that meets the costs as measured, healing, and
the measurement of the saved model.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.check import verify
from secateur.cost import layer_of_axes, parameters
from secateur.errors import PlanError
from secateur.metrics.evaluation import compare
from secateur.plan import Plan
from secateur.search.build import Cache, plan_of
from secateur.search.candidate import Candidate
from secateur.search.choice import choose, uniform
from secateur.search.costs import Cost, costs_of
from secateur.search.heal import Healed, heal
from secateur.search.journal import Journal
from secateur.search.layers import with_layers
from secateur.search.levels import METHODS, layers_of, levels_of
from secateur.search.measure import Measured, measure
from secateur.search.points import Point
from secateur.search.refine import refine, rescaled
from secateur.search.rows import Rows
from secateur.search.stored import collected
from secateur.search.stored import save as save_levels
from secateur.search.target import Call, Target
from secateur.search.trial import Trial, best_of
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost
from secateur.torch.reloaded import reload_gap

MISSED, SPARE = 0.03, 0.05
"""A result may cost this much more than was asked, and less, when it is measured; else the costs are corrected and the
sizes are chosen again."""
CORRECTIONS = 3
RIDGES = (0.01, 0.1, 1.0)
"""Ridges of the closed form, of which the search rows choose."""
FEW = 192
"""Search rows that tell ridges and single layers apart."""
Say = Callable[[str], None]


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
    """

    candidate: Candidate
    method: str
    ridge: float
    divergence: float


class Stages:
    """The dense model with everything that is known of it, and the stages that a search goes through.

    work: folder of finished stages.
    """

    def __init__(
        self,
        host: TorchHost,
        task: Task,
        target: Target,
        rows: Rows,
        work: Path,
        settings: Settings,
        *,
        track: Track = silent,
        say: Say = lambda text: None,
    ) -> None:
        self.host, self.task, self.target, self.rows = host, task, target, rows
        self.work, self.settings, self.track, self.say = work, settings, track, say
        asked = hashlib.sha256(repr((target, settings)).encode()).hexdigest()[:12]
        self.points = work / f"asked-{asked}"
        self.journal = Journal(self.points)
        self.inside = layer_of_axes(host.layout)
        self.seconds: dict[str, float] = {}
        with self.timed("dense model"):
            self.reference = Reference(task, host.model, rows.search, track)
            self.test = Reference(task, host.model, rows.test, track)
        with self.timed("statistics"):
            self.stats = collected(host, task, rows.calibration, work, seed=settings.seed, track=track)
        with self.timed("levels"):
            self.levels = {name: levels_of(host, self.stats, name) for name in METHODS}
        self.trials: dict[tuple[str, float], Trial] = {}
        self.few = max(1, -(-FEW // rows.search.batch_size))
        self._refitted: Cache = {}
        self._dense_artefacts: dict[Call, Path] = {}
        with self.timed("costs"):
            self.costs: Sequence[Cost] = costs_of(target, host, say=say)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that the context lasts to those of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

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

    # -- choice -------------------------------------------------------------------------------------------------------

    def chosen(self, costs: Sequence[Cost]) -> Chosen:
        """The best candidate within the costs by true divergence: of both orders, several ridges, and whole layers.

        Uniform sizes are tried too, as curves may be wrong.

        Raises PlanError when the bounds cannot be reached.
        """
        with self.timed("choice"):
            found = [self._with_ridge(choose(self.levels[m], costs, inside=self.inside), m) for m in METHODS]
            if len(costs) == 1:
                found.append(self._with_ridge(uniform(self.levels[METHODS[0]], costs[0]), METHODS[0]))
            return self._with_layers(costs, min(found, key=lambda one: one.divergence))

    def _with_ridge(self, candidate: Candidate, method: str) -> Chosen:
        """The candidate with the ridge of least divergence."""
        ridge = min(RIDGES, key=lambda ridge: self.trial(method, ridge).divergence(candidate, self.few))
        return Chosen(candidate, method, ridge, self.trial(method, ridge).divergence(candidate))

    def _with_layers(self, costs: Sequence[Cost], best: Chosen) -> Chosen:
        """The same, with whole layers gone where that diverges less."""
        levels, trial = self.levels[best.method], self.trial(best.method, best.ridge)
        if not any(cost.layers for cost in costs):
            return best

        def rough(candidate: Candidate) -> float:
            return trial.divergence(candidate, self.few)

        if not levels.layers:
            measured = layers_of(self.host.layout, lambda gone: rough(Candidate(dropped=gone)))
            levels = self.levels[best.method] = replace(levels, layers=measured)
        tried = with_layers(levels, costs, rough, inside=self.inside)
        winner = best_of(trial, [best.candidate, *tried])
        return replace(best, candidate=winner, divergence=trial.divergence(winner))

    def refined(self, chosen: Chosen, costs: Sequence[Cost]) -> Chosen:
        """The candidate after rescaling the curves and a local search, where these diverge less."""
        with self.timed("search"):
            trial, levels = self.trial(chosen.method, chosen.ridge), self.levels[chosen.method]
            levels = rescaled(levels, chosen.candidate, trial, inside=self.inside, batches=self.few)
            again = choose(levels, costs, dropped=chosen.candidate.dropped, inside=self.inside)
            start = best_of(trial, [chosen.candidate, again])
            better = refine(
                start,
                levels,
                costs,
                trial,
                inside=self.inside,
                seconds=self.settings.search_seconds,
                seed=self.settings.seed,
                say=self.say,
            )
            return replace(chosen, candidate=better, divergence=trial.divergence(better))

    def cut(self, chosen: Chosen) -> tuple[TorchHost, Plan]:
        """The smaller model and its plan, after the masked and the shrunk model were found equal."""
        plan = self.plan_of(chosen.candidate, chosen.method, chosen.ridge)
        verify(self.host, plan, self.rows.search)
        small = self.host.copy()
        small.resize(plan)
        return small, plan

    # -- what a choice becomes ----------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """The calls that results are timed with."""
        named = [self.target.call, *(limit.call for limit in self.target.limits)]
        return list(dict.fromkeys(call for call in named if call is not None))

    def measured(self, small: TorchHost, place: Path) -> dict[Call, Measured]:
        """The times of a model beside those of the dense one, for each call."""
        with self.timed("measurement"):
            dense, folder = self.points / "dense", place / "model"
            if not dense.exists():
                self.host.save(dense, **self.task.companions)
            small.save(folder, overwrite=True, **self.task.companions)
            found = {}
            for number, call in enumerate(self.calls):
                work = place / f"measured-{number}"
                shutil.rmtree(work, ignore_errors=True)
                before = self._dense_artefacts.get(call)
                found[call] = measure(dense, folder, call, work, dense_artefact=before, say=self.say)
                if before is None:
                    kept = self.points / f"dense-artefact-{number}"
                    shutil.copytree(found[call].dense_artefact, kept, dirs_exist_ok=True)
                    self._dense_artefacts[call] = kept
            return found

    def met(self, name: str, costs: Sequence[Cost]) -> tuple[Chosen, Sequence[Cost]]:
        """A choice that costs what was asked when it is measured, and the corrected costs.

        A choice that misses corrects the costs and is made again, at most `CORRECTIONS` times; the nearest one stays.
        """
        place = self.place(name)

        def make() -> Any:
            now = list(costs)
            tries: list[tuple[float, Chosen, list[float]]] = []
            for _ in range(1 + CORRECTIONS):
                try:
                    chosen = self.refined(self.chosen(now), now)
                except PlanError:
                    if not tries:
                        raise
                    break  # by what was measured, no sizes are small enough
                times = self.measured(self.cut(chosen)[0], place)
                ratios = {quantity_of(cost): reached(cost, chosen.candidate, times) for cost in now}
                tries.append((max(ratios.values()), chosen, [cost.correction for cost in now]))
                if is_near(now, ratios):
                    break
                shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
                self.say(f"{name}: measured over permitted: {shown}; the costs are corrected, and sizes chosen again")
                now = [corrected(cost, chosen.candidate, times) for cost in now]
            best = min(tries, key=lambda one: (one[0] > 1 + MISSED, abs(one[0] - 1)))
            return {**asdict(best[1]), "corrections": best[2]}

        value = self.journal.once(f"{name}-chosen", make)
        chosen = chosen_from(value)
        return chosen, [replace(c, correction=f) for c, f in zip(costs, value["corrections"], strict=True)]

    def lost(self, chosen: Chosen) -> float:
        """What a choice loses on the search rows: the drop of the main metric, or the divergence."""
        if self.target.by_divergence:
            return chosen.divergence
        with self.trial(chosen.method, chosen.ridge).written(chosen.candidate) as model:
            found = evaluate(self.task, model.model, self.rows.search, self.reference)
        return compare(self.reference.evaluation(), found).drop

    def uniform(self, name: str, costs: Sequence[Cost]) -> Point:
        """A baseline: every axis keeps the same share, by the same orders and closed form, without healing."""
        chosen = self._with_ridge(uniform(self.levels[METHODS[0]], costs[0]), METHODS[0])
        small, plan = self.cut(chosen)
        return self.finished(name, small, plan, chosen, costs, heal_seconds=0.0)

    def point(self, name: str, costs: Sequence[Cost], heal_seconds: float) -> Point:
        """A smaller model within the costs, healed, saved in the working folder, and measured as it was saved."""
        chosen, costs = self.met(name, costs)
        small, plan = self.cut(chosen)
        return self.finished(name, small, plan, chosen, costs, heal_seconds)

    def finished(
        self, name: str, small: TorchHost, plan: Plan, chosen: Chosen, costs: Sequence[Cost], heal_seconds: float
    ) -> Point:
        """Heal, save, reload, export, time and evaluate a model."""
        place, track = self.place(name), self.track
        with self.timed("evaluation"):
            pruned = evaluate(self.task, small.model, self.rows.test, self.test, track)
        healed = self.healed(name, small, heal_seconds)
        final = pruned
        if healed is not None and healed.best:
            with self.timed("evaluation"):
                final = evaluate(self.task, small.model, self.rows.test, self.test, track)
        times = self.measured(small, place)
        gap = self.saved(small, plan, place / "model")
        counts = parameters(self.host.layout, plan).total, parameters(self.host.layout).total
        return Point(
            name=name,
            candidate=chosen.candidate,
            method=chosen.method,
            costs={quantity_of(cost): cost.of(chosen.candidate) for cost in costs},
            pruned=pruned,
            final=final,
            drop=compare(self.test.evaluation(), final),
            healed=healed,
            measured=times,
            parameters=counts,
            reload_difference=gap,
            folder=place / "model",
        )

    def healed(self, name: str, small: TorchHost, seconds: float) -> Healed | None:
        """Train a model in place with the dense one as teacher; a finished training is taken from disk."""
        if seconds <= 0:
            return None
        file = self.place(name) / "healed.safetensors"
        with self.timed("healing"):
            wanted = None if self.target.by_divergence else self.target.max_drop

            def make() -> Any:
                done = heal(
                    small,
                    self.host,
                    self.task,
                    self.rows,
                    seconds=seconds,
                    wanted=wanted,
                    seed=self.settings.seed,
                    reference=self.reference,
                    track=self.track,
                )
                write_state(small.model, file)
                return done.as_json()

            was_there = self.journal.has(f"{name}-healed") and file.is_file()
            done = Healed.from_json(self.journal.once(f"{name}-healed", make))
            if was_there:
                read_state(small.model, file)
            return done

    def saved(self, small: TorchHost, plan: Plan, folder: Path) -> float:
        """Save a model with its plan and read it again; 0.0, the difference, or ModelError."""
        small.save(folder, plan, overwrite=True, **self.task.companions, **self.settings.save_options)
        save_levels(self.levels[str(plan.provenance["method"])], folder)
        return reload_gap(small, folder, self.rows.test[0])

    def place(self, name: str) -> Path:
        """The working folder of a point."""
        folder = self.points / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


# -- parts ------------------------------------------------------------------------------------------------------------


def quantity_of(cost: Cost) -> str:
    """What a cost counts, with its runtime."""
    call = cost.limit.call
    return cost.limit.quantity if call is None else f"{cost.limit.quantity}@{call.runtime}"


def reached(cost: Cost, candidate: Candidate, times: Mapping[Call, Measured]) -> float:
    """What a model costs over what is permitted: measured for latency and memory, else counted."""
    limit = cost.limit
    if limit.call is None:
        return cost.of(candidate) / cost.bound
    found = times[limit.call]
    if limit.quantity == "latency":
        return (found.share if limit.relative else found.ms) / limit.bound
    return (found.memory / found.dense_memory if limit.relative else found.memory) / limit.bound


def is_near(costs: Sequence[Cost], ratios: Mapping[str, float]) -> bool:
    """Whether the measured costs are near their bounds: none above, and the nearest not far below.

    ratios: what `reached` gives, by `quantity_of`.
    """
    timed = [ratios[quantity_of(cost)] for cost in costs if cost.limit.call is not None]
    if not timed or max(timed) > 1 + MISSED:
        return not timed
    return max(ratios.values()) >= 1 / (1 + SPARE)


def corrected(cost: Cost, candidate: Candidate, times: Mapping[Call, Measured]) -> Cost:
    """The cost with its predictions multiplied so that it predicts what was measured of a candidate."""
    if cost.limit.call is None:
        return cost
    measured = reached(cost, candidate, times) * cost.bound
    return replace(cost, correction=cost.correction * measured / cost.of(candidate))


def write_state(model: nn.Module, file: Path) -> None:
    """Write the trainable numbers of a model."""
    save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, file)


def read_state(model: nn.Module, file: Path) -> None:
    """Read what `write_state` wrote of a model of the same sizes."""
    stored = load_file(file)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(stored[name])


def chosen_from(value: Mapping[str, Any]) -> Chosen:
    """What `asdict` made of a Chosen, from JSON."""
    parts = value["candidate"]
    dropped = {axis: tuple(gone) for axis, gone in parts["dropped"].items()}
    candidate = Candidate(parts["kept"], dropped, parts["densities"])
    return Chosen(candidate, value["method"], value["ridge"], value["divergence"])
