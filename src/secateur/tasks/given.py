"""given: the task of any module, from a loss and a metric that the user writes, on batches that the user makes.

task = secateur.tasks.given(loss=my_loss, metric=my_metric, name="accuracy")
host = secateur.open(model, example, loss=task.loss)
print(task.evaluate(model, task.batches(batches)).values)

A batch is a mapping of keyword arguments, labels among them; or a tuple whose last item is what is right and whose
other items are the model's arguments; or one tensor, the model's only argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from secateur.data.columns import Column
from secateur.errors import DataError
from secateur.metrics.metric import Metric, column, mean
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.fisher import noise
from secateur.tasks.base.task import Examples, Task
from secateur.torch.base.batches import LABELS, size_of

Loss = Callable[[nn.Module, Any], torch.Tensor]
Score = Callable[[Any, Any], Any]


def given(*, loss: Loss, metric: Score, higher_is_better: bool = True, name: str = "metric") -> Given:
    """The task of a model that none of the other tasks knows.

    loss: (model, batch) -> a scalar, the mean over the rows of the batch.
    metric: (outputs of the model, batch) -> one number for each row; the metric of a model is their mean.
    higher_is_better: the direction of the metric.
    name: of the metric.

    Both get the batches as the user made them, on the device of the model.
    """
    return Given(loss, metric, Metric(name, is_higher_better=higher_is_better, rows=_numbers, whole=mean))


class Given(Task):
    """A task of two functions; `given` makes it."""

    name = "given"
    auto_classes: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    has_own_loss = True
    reads_labels = True
    divergence_name = "distance"

    def __init__(self, loss: Loss, score: Score, metric: Metric) -> None:
        super().__init__(nn.Module(), None)  # it asks nothing of a model
        self._loss, self._score, self._metric = loss, score, metric

    @property
    def companions(self) -> dict[str, Any]:
        """Nothing is known to belong to the model."""
        return {}

    def encode(self, table: Any) -> Examples:
        """Batches for training. table: the batches; a step of `fine_tune(..., batch_size=1)` takes one of them."""
        batches = _wrapped_all(table)
        return Examples(batches, range(len(batches)), None, len(batches))

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, Any]:
        """One batch as it is; several joined, where their tensors have the same shapes."""
        if len(features) == 1:
            return dict(features[0])
        try:
            return {name: _joined([feature[name] for feature in features]) for name in features[0]}
        except (RuntimeError, TypeError, KeyError) as error:
            raise DataError(
                f"{len(features)} batches cannot be joined ({error}); pass batch_size=1 to take them one by one"
            ) from None

    def batches(self, rows: Any, batch_size: int = 1) -> Batches:
        """The batches for evaluation and calibration. rows: an iterable of batches, which is read once."""
        if batch_size != 1:
            raise DataError(f"the batches are taken as they are, not {batch_size} together; leave out batch_size")
        return GivenBatches(self, _wrapped_all(rows))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The user's loss."""
        return self._loss(model, _unwrapped(batch))

    def divergence(self, output: Any, dense: Any, batch: Mapping[str, Any], temperature: float = 1.0) -> torch.Tensor:
        """The squared distance of a row's outputs, divided by the square of the dense model's; a mean over outputs."""
        parts = []
        for own, wanted in zip(_tensors(output), _tensors(dense), strict=True):
            own, wanted = (values.float().reshape(len(values), -1) for values in (own, wanted))
            parts.append((own - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12))
        if not parts:
            raise DataError("the model gives no tensor of numbers; there is nothing to compare or to learn from")
        return torch.stack(parts).mean(0)

    def fisher_loss(self, output: Any, batch: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        """The outputs times Gaussian noise, relative to their size: the curvature of a relative squared distance."""
        found = [values.float().reshape(len(values), -1) for values in _tensors(output)]
        if not found:
            raise DataError("the model gives no tensor of numbers; there is nothing to compare or to learn from")
        scale = (2 / len(found)) ** 0.5
        parts = [
            (values * noise(values, generator)).sum(1) / values.detach().square().sum(1).clamp_min(1e-12).sqrt()
            for values in found
        ]
        return scale * torch.stack(parts).sum()

    def read(self, model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The number of each row, from the user's metric."""
        found = self._score(output, _unwrapped(batch))
        found = found.detach().cpu() if isinstance(found, torch.Tensor) else found
        numbers, rows = np.asarray(found, np.float64), size_of(batch)
        if numbers.shape != (rows,):
            raise DataError(
                f"the metric gives numbers of shape {numbers.shape} for a batch of {rows} rows; it must give one a row"
            )
        return [np.asarray(number) for number in numbers]

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Any:
        """The number of the row."""
        return float(parts[0])

    def same(self, prediction: Any, other: Any) -> bool | None:
        """What the answers are is not known."""
        return None

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """The user's metric."""
        return (self._metric,)

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The number."""
        return {self._metric.name: prediction}


class GivenBatches(Batches):
    """Batches as the user made them; what is right is in the batches themselves."""

    def __init__(self, task: Given, batches: Sequence[dict[str, Any]]) -> None:
        self._batches = list(batches)
        self._ends = np.cumsum([size_of(batch) for batch in self._batches])
        count = int(self._ends[-1])
        rows: list[dict[str, Any]] = [{"labels": None}] * count
        super().__init__(task, Examples(rows, range(count), [None] * count, count), 1)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def members(self, index: int) -> list[int]:
        """The rows of a batch, as positions among all rows."""
        return list(range(int(self._ends[index] - size_of(self._batches[index])), int(self._ends[index])))


# -- a batch of the user as a mapping, and back -----------------------------------------------------------------------


def _wrapped_all(batches: Iterable[Any]) -> list[dict[str, Any]]:
    if isinstance(batches, torch.Tensor | Mapping | str):
        raise DataError(f"pass a list of batches, not one {type(batches).__name__}")
    wrapped = [_wrapped(batch) for batch in batches]
    if not wrapped:
        raise DataError("there are no batches; pass at least one")
    return wrapped


def _wrapped(batch: Any) -> dict[str, Any]:
    """A batch as a mapping: arguments by name or by number ("0", "1", ...), and `labels`, None where there are none."""
    if isinstance(batch, Mapping):
        return dict(batch) if not set(LABELS).isdisjoint(batch) else {**batch, "labels": None}
    if isinstance(batch, torch.Tensor):
        return {"0": batch, "labels": None}
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise DataError(
            f"a batch is a mapping, a tensor, or a tuple (x, ..., y), not a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        )
    return {**{str(i): value for i, value in enumerate(batch[:-1])}, "labels": batch[-1]}


def _unwrapped(batch: Any) -> Any:
    """The batch as the user made it."""
    if not isinstance(batch, Mapping):
        return batch
    if "0" not in batch:
        return {name: value for name, value in batch.items() if name != "labels" or value is not None}
    inputs = tuple(value for name, value in batch.items() if name.isdigit())
    return inputs[0] if batch["labels"] is None else (*inputs, batch["labels"])


def _joined(values: Sequence[Any]) -> Any:
    if all(value is None for value in values):
        return None
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [item for value in values for item in value]


def _tensors(output: Any) -> list[torch.Tensor]:
    """The numbers of an output that have a row for each example."""
    if isinstance(output, torch.Tensor):
        found = [output]
    elif isinstance(output, Mapping):
        found = [value for name, value in output.items() if name != "loss" and isinstance(value, torch.Tensor)]
    else:
        found = [value for value in output if isinstance(value, torch.Tensor)]
    return [value for value in found if value.dim() and value.is_floating_point()]


def _numbers(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    return column(predictions)
