"""Stages of a search, each done once: a choice that costs what was asked when it is measured, healing, and the
measurement of the saved model.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.cost import parameters
from secateur.errors import PlanError
from secateur.metrics.evaluation import compare
from secateur.plan import Plan, resized_masks
from secateur.records.model import matrices_of, sizes_of, units_of, weight_bytes
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import uniform
from secateur.search.choosing.chooser import Chooser, Chosen, Say, Settings
from secateur.search.costs import Cost, costs_of
from secateur.search.heal import Healed, heal
from secateur.search.journal import Journal
from secateur.search.levels import METHODS
from secateur.search.measure import Measured, measure
from secateur.search.points import Point
from secateur.search.readers import check_reader, readable
from secateur.search.rows import Rows
from secateur.search.stored import save as save_levels
from secateur.search.target import Call, Target, calls_of
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost
from secateur.torch.reloaded import reload_gap

MISSED, SPARE = 0.03, 0.05
"""A result may cost this much more than was asked, and less, when it is measured; else the costs are corrected and the
sizes are chosen again."""
CORRECTIONS, SPARED = 3, 0.015
"""Times that costs are corrected, and what a choice spares of a measured cost, as two measurements never agree."""


class Stages(Chooser):
    """A chooser with a target: what is chosen is cut, exported, timed, healed and saved.

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
        stage: Say = lambda name: None,
        best: Say = lambda text: None,
    ) -> None:
        shown: dict[str, Any] = {"track": track, "say": say, "stage": stage, "best": best}
        super().__init__(host, task, rows, work, settings, by_divergence=target.by_divergence, **shown)
        self.target = target
        asked = hashlib.sha256(repr((target, settings)).encode()).hexdigest()[:12]
        self.points = work / f"asked-{asked}"
        self.journal = Journal(self.points)
        self._dense_artefacts: dict[Call, Path] = {}
        with self.timed("dense model"):
            self.test = Reference(task, host.model, rows.test, track)
        with self.timed("costs"):
            self.costs: Sequence[Cost] = self.priced()

    def priced(self) -> Sequence[Cost]:
        """The cost of each limit of the target."""
        return readable(costs_of(self.target, self.host, say=self.say), self.host.layout, self.target.reader)

    # -- what a choice becomes ----------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """The calls that results are timed with."""
        return calls_of(self.target)

    def dense_folder(self) -> Path:
        """The folder of the dense model, as the runtimes read it."""
        folder = self.points / "dense"
        if not folder.exists():
            self.host.save(folder, **self.task.companions)
        return folder

    def measured(self, place: Path) -> dict[Call, Measured]:
        """The times of the model that was saved in a place, beside those of the dense one, for each call."""
        with self.timed("measurement"):
            dense, folder = self.dense_folder(), place / "model"
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
            now = [sparing(cost) for cost in costs]
            tries: list[tuple[float, Chosen, list[float]]] = []
            for _ in range(1 + CORRECTIONS):
                try:
                    chosen = self.refined(self.ranked(now, self.target.max_drop), now)
                except PlanError:
                    if not tries:
                        raise
                    break  # by what was measured, no sizes are small enough
                self.saved(*self.cut(chosen), place)
                times = self.measured(place)
                ratios = {quantity_of(cost): reached(cost, chosen.candidate, times) for cost in now}
                tries.append((max(ratios.values()), chosen, [cost.correction for cost in now]))
                if is_near(now, ratios):
                    break
                shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
                self.say(f"{name}: measured over permitted: {shown}; the costs are corrected, and sizes chosen again")
                now = [sparing(corrected(cost, chosen.candidate, times)) for cost in now]
            best = min(tries, key=lambda one: (one[0] > 1 + MISSED, abs(one[0] - 1)))
            return {**asdict(best[1]), "corrections": best[2]}

        value = self.journal.once(f"{name}-chosen", make)
        chosen = chosen_from(value)
        return chosen, [replace(c, correction=f) for c, f in zip(costs, value["corrections"], strict=True)]

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
        """Heal, save, reload, export, time and evaluate a model. DeployError where its server does not read it."""
        check_reader(small.model, self.target.reader)
        place, track = self.place(name), self.track
        with self.timed("evaluation"):
            pruned = evaluate(self.task, small.model, self.rows.test, self.test, track)
        healed = None
        if heal_seconds > 0 and not self.is_enough(chosen):
            healed = self.healed(name, small, plan, heal_seconds)
        final = pruned
        if healed is not None and healed.best:
            with self.timed("evaluation"):
                final = evaluate(self.task, small.model, self.rows.test, self.test, track)
        self.saved(small, plan, place)
        gap = reload_gap(small, place / "model", self.rows.test[0])
        times = self.measured(place)
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
            trace=chosen.trace,
            sizes=sizes_of(
                self.host.layout,
                plan,
                bytes=weight_bytes(place / "model"),
                dense_bytes=weight_bytes(self.host.source),
            ),
            units=units_of(self.host.layout, plan),
            matrices=matrices_of(self.host.layout, plan),
        )

    def is_enough(self, chosen: Chosen) -> bool:
        """Whether the divergence of a choice is permitted as it is."""
        permitted = self.target.max_drop if self.target.by_divergence else None
        return permitted is not None and chosen.divergence <= permitted

    def healed(self, name: str, small: TorchHost, plan: Plan, seconds: float) -> Healed:
        """Train a model in place with the dense one as teacher; a finished training is taken from disk.

        plan: what made the model; its single zeros stay.
        """
        file = self.place(name) / "healed.safetensors"
        with self.timed("healing"):
            wanted = None if self.target.by_divergence else self.target.max_drop

            def make() -> Any:
                done = heal(
                    small,
                    self.host,
                    self.task,
                    self.rows,
                    plan=resized_masks(self.host.layout, plan) if plan.masks else None,
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

    def saved(self, small: TorchHost, plan: Plan, place: Path) -> None:
        """Save a model with its plan and its levels in a place."""
        folder = place / "model"
        small.save(folder, plan, overwrite=True, **self.task.companions, **self.settings.save_options)
        save_levels(self.levels[str(plan.provenance["method"])], folder)

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


def sparing(cost: Cost) -> Cost:
    """The cost with its predictions raised by what a choice spares of it, where it is measured."""
    return cost if cost.limit.call is None else replace(cost, correction=cost.correction * (1 + SPARED))


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
    trace = tuple((moves, divergence) for moves, divergence in value.get("trace", ()))
    return Chosen(candidate, value["method"], value["ridge"], value["divergence"], trace)
