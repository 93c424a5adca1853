"""Outcome: what a pruning job gives, the same for every framework and task."""

from dataclasses import dataclass, field
from typing import Any

from secateur import notebook
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.token_schedule import TokenSchedule


@dataclass(frozen=True)
class Outcome:
    """The result of one job.

    name: name of the job.
    dense, pruned, tuned: evaluations of the dense, the pruned and the fine-tuned model; None without fine-tuning.
    drop: how much worse the saved model is than the dense one, with its interval.
    total: number of parameters of the pruned model.
    nonzero: number of those parameters that are not zero.
    macs_ratio: multiply-accumulates of the pruned over the dense model; None where the layout (written by hand) lists
        no products.
    difference: difference between the masked and the shrunk model.
    folder: the saved folder; empty when nothing was saved.
    bytes: size of the saved folder in bytes.
    linear_bytes: size of the saved prunable weights in bytes.
    reload_difference: difference between the saved and the reloaded model; NaN when nothing was saved.
    inexact: why `difference` is not zero by design (hidden width between layer norms); empty when it is.
    provenance: how the plan was made.
    schedule, shortened: the schedule of tokens that the saved model runs with, and its evaluation with it; None without
        one.
    """

    name: str
    dense: Evaluation
    pruned: Evaluation
    tuned: Evaluation | None
    drop: Drop
    total: int
    nonzero: int
    macs_ratio: float | None
    difference: float
    folder: str = ""
    bytes: int = 0
    linear_bytes: int = 0
    reload_difference: float = float("nan")
    inexact: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    schedule: TokenSchedule | None = None
    shortened: Evaluation | None = None

    def _repr_html_(self) -> str:
        stages = {"dense": self.dense, "pruned": self.pruned, "fine-tuned": self.tuned, "fewer tokens": self.shortened}
        rows = [
            (name, *map(notebook.number, (one.value, one.loss, one.kl, one.flips)))
            for name, one in stages.items()
            if one is not None
        ]
        columns = ("model", self.dense.metric, "loss", f"{self.dense.divergence} to dense", "flips")
        sizes = f"{self.total:,} parameters, of which {self.nonzero:,} are not zero"
        drop = f"drop {notebook.number(self.drop.drop)}, interval {notebook.interval(self.drop.interval)}"
        return notebook.table(self.name, columns, rows, notes=[drop, self.drop.reading, sizes, self.inexact])

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; `pruned` is the main metric of the model that was saved."""
        stages = {"dense": self.dense, "pruned": self.pruned, "tuned": self.tuned, "tokens": self.shortened}
        plain = ("name", "total", "nonzero", "macs_ratio", "difference", "folder", "bytes", "linear_bytes")
        return {
            "task": self.dense.task,
            **self.drop.as_json(),
            "stages": {name: stage.as_json() for name, stage in stages.items() if stage is not None},
            **{name: getattr(self, name) for name in (*plain, "reload_difference", "inexact", "provenance")},
            **({} if self.schedule is None else self.schedule.summary()),
        }
