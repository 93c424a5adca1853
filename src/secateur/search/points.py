"""What a search found, as values: the points that were measured, and whether the target was met."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur import notebook
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.search.candidate import Candidate
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
    """

    target: Target
    points: Sequence[Point]
    best: Point | None
    reading: str
    is_met: bool = False
    baselines: Sequence[Point] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None

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
