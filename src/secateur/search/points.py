"""What a search found, as values: the points that were measured, and whether the target was met."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur import notebook
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.schemas.record import Matrix, Provenance, Sizes, Units
from secateur.search.candidate import Candidate
from secateur.search.costs import Cost
from secateur.search.heal import Healed
from secateur.search.measure import Measured
from secateur.search.target import Call, Target


@dataclass(frozen=True)
class Point:
    """One smaller model, measured.

    name: for tables, such as "2x".
    candidate: what each axis keeps.
    method: the order of its units.
    costs: quantity -> cost relative to the dense model, as predicted.
    pruned: its evaluation on the test rows before healing. final: that of the model itself.
    drop: of the final model.
    healed: what healing did; None without it.
    measured: times beside the dense model, for each call.
    parameters: how many it has, and the dense model.
    folder: where it was saved.
    reload_difference: between the saved model and the same opened again.
    trace: of the local search, see `secateur.search.choosing.chooser.Chosen`.
    sizes, units, matrices: what is left of the dense model, for the record.
    """

    name: str
    candidate: Candidate
    method: str
    costs: Mapping[str, float]
    pruned: Evaluation
    final: Evaluation
    drop: Drop
    healed: Healed | None
    measured: Mapping[Call, Measured]
    parameters: tuple[int, int]
    folder: Path
    reload_difference: float
    trace: Sequence[tuple[int, float]] = ()
    sizes: Sizes | None = None
    units: Sequence[Units] = ()
    matrices: Sequence[Matrix] = ()

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as the dense model it was measured, on the first runtime."""
        return next((times.speed_up for times in self.measured.values()), None)

    @property
    def lost(self) -> float:
        """The drop of the main metric."""
        return self.drop.drop

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "speed_up": self.speed_up,
            **self.drop.as_json(),
            "divergence": self.final.kl,
            "pruned_divergence": self.pruned.kl,
            "flips": self.final.flips,
            "parameters": self.parameters[0],
            "parameters_share": self.parameters[0] / self.parameters[1],
            "predicted": dict(self.costs),
            "method": self.method,
            "kept": dict(self.candidate.kept),
            "densities": dict(self.candidate.densities),
            "dropped_layers": {axis: list(gone) for axis, gone in self.candidate.dropped.items()},
            "healed": None if self.healed is None else self.healed.as_json(),
            "measured": [times.as_json() for times in self.measured.values()],
            "reload_difference": self.reload_difference,
        }


@dataclass(frozen=True)
class Origin:
    """The dense model that a search began with, and how the search was run.

    dense: its evaluation on the test rows. model_type: as its config names it. costs: one for each limit of the target.
    provenance: how the results are made again.
    """

    dense: Evaluation
    model_type: str | None
    costs: Sequence[Cost]
    provenance: Provenance


@dataclass(frozen=True)
class Found:
    """The result of a search.

    target: what was asked for.
    points: what was measured, the result among them; of a frontier all of its points.
    best: the point that the target asks for, or the nearest; None where nothing could be made.
    reading: the result in a sentence.
    is_met: whether `best` meets the target.
    baselines: dense and uniformly pruned models beside the points of a frontier.
    seconds: stage -> seconds it took.
    folder: where `best` lies; None where nothing was written.
    origin: what was searched in, for the record; `automatic` adds it.
    """

    target: Target
    points: Sequence[Point]
    best: Point | None
    reading: str
    is_met: bool = False
    baselines: Sequence[Point] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    origin: Origin | None = None

    def _repr_html_(self) -> str:
        points = [*self.baselines, *self.points]
        metric = points[0].drop.metric if points else "metric"
        rows = [
            (
                f"{point.name}{' (the result)' * (point is self.best)}",
                *map(notebook.number, (point.speed_up, point.drop.pruned, point.lost)),
                notebook.interval(point.drop.interval),
                f"{point.parameters[0] / point.parameters[1]:.1%}",
            )
            for point in points
        ]
        columns = ("model", "times as fast", metric, "drop", "95% interval", "parameters")
        return notebook.table("Models that were measured", columns, rows, notes=[self.reading])

    def as_json(self) -> dict[str, Any]:
        """Plain values: `asked`, `measured` on each runtime, the drop of the main metric, the `frontier`."""
        best = self.best
        compared = {} if best is None else best.drop.as_json()
        return {
            "asked": asdict(self.target),
            "met": self.is_met,
            "runtime": None if self.target.call is None else self.target.call.runtime,
            "task": None if best is None else best.final.task,
            **compared,
            "reading": self.reading,
            "divergence": None if best is None else best.final.kl,
            "measured": [] if best is None else [times.as_json() for times in best.measured.values()],
            "best": None if best is None else best.as_json(),
            "frontier": [point.as_json() for point in self.points],
            "baselines": [point.as_json() for point in self.baselines],
            "seconds": dict(self.seconds),
            "folder": None if self.folder is None else str(self.folder),
        }


def permitted(target: Target, point: Point) -> bool:
    """Whether the quality of a model on the test rows is what the target permits."""
    if target.max_drop is None:
        return True
    if target.by_divergence:
        return (point.final.kl or 0.0) <= target.max_drop
    interval = point.drop.interval
    if target.confident:
        return interval is not None and interval[1] <= target.max_drop
    return point.drop.drop <= target.max_drop


def quality(target: Target, point: Point) -> str:
    """What a model lost, for a person."""
    if target.by_divergence:
        return f"{point.final.kl:.4g} {point.final.divergence} to the dense model"
    interval = point.drop.interval
    shown = "" if interval is None else f", 95% [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return f"{point.drop.drop:+.4f} {point.drop.metric}{shown}"
