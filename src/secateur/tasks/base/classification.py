"""What classification of texts, images and sounds shares: a row to a class, to several labels, or to a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from secateur.data.columns import Column, choose, number
from secateur.data.table import Table
from secateur.errors import DataError, shown
from secateur.metrics.classes import CLASSES, MULTI_LABEL
from secateur.metrics.metric import Metric
from secateur.metrics.numbers import PEARSON, SPEARMAN, SQUARED_ERROR
from secateur.tasks.base.fisher import binary_scores, signs
from secateur.tasks.base.labels import LabelMap, head_for
from secateur.tasks.base.task import Options, Task

LABEL = Column("label", "--label-column", ("label", "labels", "class", "category", "sentiment"), is_needed=False)


class Classification(Task):
    """A row to a class, to several labels, or to a number; a task says what a row is (`encode`, `collate`)."""

    @classmethod
    def new_head(cls, table: Table, options: Options) -> dict[str, Any]:
        """A class for each label; one number for labels with fractions; a label for each in lists of them."""
        names = choose(table, cls.columns, options.columns).names.get("label")
        if names is None:
            raise DataError(f"a new head needs labels; name their column with {LABEL.option}")
        cells = table.column(names[0])
        if len(names) > 1:
            return {**head_for(names), "problem_type": "multi_label_classification"}
        if any(isinstance(cell, list) for cell in cells):
            labels = [label for cell in cells for label in cell or ()]
            return {**head_for(labels), "problem_type": "multi_label_classification"}
        values = [number(cell) for cell in cells]
        if None not in values and any(value % 1 for value in values if value is not None):
            return {"num_labels": 1, "problem_type": "regression"}
        return head_for(cells, options.label_names or table.class_names.get(names[0]))

    @property
    def kind(self) -> str:
        """What the head gives: `classes`, `labels` (several a row), or `number`."""
        if getattr(self.config, "problem_type", None) == "multi_label_classification":
            return "labels"
        return "number" if self.config.num_labels == 1 else "classes"

    @property
    def is_stratified(self) -> bool:
        """Whether rows have one class."""
        return self.kind == "classes"

    # -- labels -------------------------------------------------------------------------------------------------------

    def labels(self, table: Table, names: Sequence[str]) -> list[Any]:
        """What is right for each row: a class number, 0 and 1 for each label, or a number."""
        if self.kind == "labels":
            return _several(table, names, self.config, self.options.label_names, self.notes)
        (name,) = names if len(names) == 1 else (None,)
        if name is None:
            raise DataError(f"--label-column names {len(names)} columns, but the model gives one answer a row")
        if self.kind == "classes":
            return LabelMap(self.config, self.options.label_names, self.notes).ids(table, name)
        return [_value(table, name, row, cell) for row, cell in enumerate(table.column(name))]

    def put_labels(
        self, features: Sequence[dict[str, Any]], table: Table, names: Sequence[str] | None
    ) -> list[Any] | None:
        """The references of the rows, which become `labels` of their features; None without a column for them."""
        if names is None:
            return None
        references = self.labels(table, names)
        for feature, label in zip(features, references, strict=True):
            feature["labels"] = label
        return references

    def with_labels(
        self, batch: dict[str, torch.Tensor], features: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """The batch with the labels of its features, if they have any."""
        labels = [feature["labels"] for feature in features if "labels" in feature]
        if not labels:
            return batch
        dtype = torch.long if self.kind == "classes" else torch.float32
        return {**batch, "labels": torch.tensor(np.array(labels), dtype=dtype)}

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def divergence(self, output: Any, dense: Any, batch: Mapping[str, Any], temperature: float = 1.0) -> torch.Tensor:
        """KL between classes; between each label and its absence, summed; of numbers the squared difference."""
        own, wanted = output.logits.float(), dense.logits.float()
        if self.kind == "number":
            return (own - wanted).square().reshape(len(own), -1).mean(1)
        if self.kind == "labels":
            own, wanted = own / temperature, wanted / temperature
            share = wanted.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(wanted, share, reduction="none")
            cross = F.binary_cross_entropy_with_logits(own, share, reduction="none")
            return temperature**2 * (cross - entropy).sum(-1)
        return super().divergence(output, dense, batch, temperature)

    def fisher_loss(self, output: Any, batch: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        """Of labels, each is there or not; of numbers, 2 is the curvature of a squared difference."""
        logits = output.logits.float()
        if self.kind == "number":
            return (signs(logits, generator) * logits).sum() * (2 * len(logits) / logits.numel()) ** 0.5
        if self.kind == "labels":
            return binary_scores(logits, generator).sum()
        return super().fisher_loss(output, batch, generator)

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The most likely class, the likely labels, or the number itself."""
        if self.kind == "labels":
            return {"labels": (output.logits > 0).float()}
        return {"labels": output.logits.float().reshape(-1) if self.kind == "number" else output.logits.argmax(-1)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Any:
        """A class number, the logits of all labels, or a number."""
        logits = parts[0]
        if logits.ndim != 1:
            raise DataError(f"the model gives {logits.shape} numbers for a row, not one score a class")
        if self.kind == "labels":
            return logits
        return float(logits[0]) if self.kind == "number" else int(np.argmax(logits))

    def same(self, prediction: Any, other: Any) -> bool | None:
        """Whether class or labels are the same; numbers are no answers to count."""
        if self.kind == "number":
            return None
        return bool(np.array_equal(prediction > 0, other > 0)) if self.kind == "labels" else prediction == other

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """Accuracy and macro F1; of labels micro F1 and average precision; of numbers correlations and error."""
        if self.kind == "labels":
            return MULTI_LABEL
        return (PEARSON, SPEARMAN, SQUARED_ERROR) if self.kind == "number" else CLASSES

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The label with its probability; all likely labels; or the number."""
        names = self.config.id2label
        logits = np.asarray(parts[0], np.float64)
        if self.kind == "number":
            return {"value": prediction}
        if self.kind == "labels":
            likely = 1 / (1 + np.exp(-logits))
            return {"labels": {names[i]: float(p) for i, p in enumerate(likely) if p > 0.5}}
        share = np.exp(logits - logits.max())
        return {"label": names[prediction], "probability": float(share[prediction] / share.sum())}

    def answer(self, prediction: Any) -> str:
        """The name of the class; the names of the labels, in the order of the head; or the number."""
        names = self.config.id2label
        if self.kind == "classes":
            return str(names[prediction])
        if self.kind == "labels":
            return ", ".join(str(names[i]) for i, score in enumerate(prediction) if score > 0) or "none"
        return f"{float(prediction):.4g}"

    def expected(self, reference: Any) -> str | None:
        """What is right, as an answer."""
        return self.answer(reference)


def loss_of_head(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of logits (examples, classes) of a head of that kind: cross entropy, of each label or of classes; or
    the mean squared error.
    """
    logits = logits.float()
    if kind == "labels":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    if kind == "number":
        return F.mse_loss(logits.reshape(-1), labels.float().reshape(-1))
    return F.cross_entropy(logits, labels)


class OwnLoss(Classification):
    """Classification by models of which some know the loss of classes only, whatever their head is said to give."""

    def __init__(self, model: nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        self.has_own_loss = self.kind != "classes"

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Cross entropy of classes or of each label, or the squared error of numbers."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return loss_of_head(self.kind, model(**inputs).logits, batch["labels"])


def _value(table: Table, name: str, row: int, cell: Any) -> float:
    value = number(cell)
    if value is None:
        raise DataError(f"{table.where(row)}: {shown(cell, 60)} in column {name!r} is no number; the model gives one")
    return value


def _several(
    table: Table, names: Sequence[str], config: Any, given: Sequence[str], notes: list[str]
) -> list[np.ndarray]:
    """Labels of rows as 0 and 1: a list of labels a cell, labels with commas, or a column of 0 and 1 for each label."""
    size = int(config.num_labels)
    if len(names) > 1:
        if len(names) != size:
            raise DataError(f"--label-column names {len(names)} columns, the model has {size} labels")
        rows = [[_value(table, name, row, table.column(name)[row]) for name in names] for row in range(len(table))]
        return [np.array(values, np.float32) for values in rows]
    labels = LabelMap(config, given, notes)
    found = []
    for row, cell in enumerate(table.column(names[0])):
        cells = [word.strip() for word in cell.split(",") if word.strip()] if isinstance(cell, str) else cell
        if cells is None or isinstance(cells, int | float | Mapping):
            cells = [] if cells is None else [cells]
        if len(cells) == size and all(value in (0, 1) and not isinstance(value, str) for value in cells):
            found.append(np.array(cells, np.float32))
            continue
        values = np.zeros(size, np.float32)
        values[[labels.id(table, names[0], row, label) for label in cells]] = 1
        found.append(values)
    return found
