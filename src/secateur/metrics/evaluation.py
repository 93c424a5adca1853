"""Evaluation: what a model is worth on some rows, with the statistics that a paired comparison of two models needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur import notebook
from secateur.errors import DataError
from secateur.metrics.classes import CLASSES
from secateur.metrics.drop import Drop, drop
from secateur.metrics.metric import Metric
from secateur.scores import log_softmax


@dataclass(frozen=True)
class Evaluation:
    """The result of one model on one set of rows.

    task: its name.
    rows: how many rows.
    metric: the name of the main metric.
    values: name of a metric -> its value; the main one first.
    is_against_dense: whether the metrics compare with the dense model's answers, as the data has no labels.
    loss: the mean loss over batches with labels; None without.
    kl: mean divergence from the dense model's outputs, in nats where it is a KL; None without a dense model.
    flips: the share of rows (of texts: of their tokens) whose answer is not the dense model's; None without a dense
        model.
    predictions: for each row what the model answers.
    divergence: the name of what `kl` holds.
    row_divergences: how far each row is from the dense model (rows,), of which `kl` is the mean over examples; None
        without a dense model.
    main, table: the main metric and its statistics (rows, k), for `compare`.
    """

    task: str
    rows: int
    metric: str
    values: Mapping[str, float]
    is_against_dense: bool = False
    loss: float | None = None
    kl: float | None = None
    flips: float | None = None
    predictions: Sequence[Any] = ()
    divergence: str = "KL"
    row_divergences: np.ndarray | None = field(default=None, repr=False)
    main: Metric | None = field(default=None, repr=False)
    table: np.ndarray | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """The value of the main metric."""
        return self.values[self.metric]

    def _repr_html_(self) -> str:
        rows = [
            *self.values.items(),
            ("loss", self.loss),
            (f"{self.divergence} to dense", self.kl),
            ("flips", self.flips),
        ]
        title = f"{self.task}, {self.rows:,} rows{', against the answers of the dense model' * self.is_against_dense}"
        return notebook.table(title, ("metric", "value"), [(name, notebook.number(value)) for name, value in rows])

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, without the predictions."""
        return {
            "task": self.task,
            "rows": self.rows,
            "metric": self.metric,
            "values": dict(self.values),
            "against_dense": self.is_against_dense,
            "loss": self.loss,
            "kl": self.kl,
            "divergence": self.divergence,
            "flips": self.flips,
        }


def compare(dense: Evaluation, pruned: Evaluation) -> Drop:
    """The drop of the main metric from the dense to the pruned model, with its interval over rows."""
    assert dense.main is not None
    assert dense.table is not None
    assert pruned.table is not None
    return drop(dense.main, dense.table, pruned.table)


def of_classes(task: str, logits: np.ndarray, labels: np.ndarray, dense: np.ndarray | None = None) -> Evaluation:
    """The evaluation of a classifier from its logits (rows, classes) and class numbers (rows,).

    task: its name. dense: the dense model's logits on the same rows.

    Raises DataError when the two models have different classes.
    """
    if dense is not None and dense.shape != logits.shape:
        raise DataError(
            f"outputs of shape {logits.shape} and {dense.shape} cannot be compared; both models need the same classes"
        )
    log_p, answers = log_softmax(logits), logits.argmax(-1)
    kl = flips = None
    if dense is not None:
        log_q = log_softmax(dense)
        kl = float((np.exp(log_q) * (log_q - log_p)).sum(-1).mean())
        flips = float((answers != dense.argmax(-1)).mean())
    predictions = answers.tolist()
    tables = {metric.name: metric.rows(predictions, labels.tolist()) for metric in CLASSES}
    return Evaluation(
        task=task,
        rows=len(labels),
        metric=CLASSES[0].name,
        values={metric.name: metric.whole(tables[metric.name]) for metric in CLASSES},
        loss=float(-log_p[np.arange(len(labels)), labels].mean()),
        kl=kl,
        flips=flips,
        predictions=predictions,
        main=CLASSES[0],
        table=tables[CLASSES[0].name],
    )
