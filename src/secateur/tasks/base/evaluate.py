"""Evaluate a model on batches of a task: metrics, loss, and how far it is from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from secateur.errors import DataError, ModelError
from secateur.metrics.evaluation import Evaluation
from secateur.torch.base.batches import call, evaluating, run, to_device, with_decoder_inputs, without_labels

if TYPE_CHECKING:
    from secateur.tasks.base.batches import Batches
    from secateur.tasks.base.task import Task

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable with a progress bar: (iterable, description) -> the same items."""
MOST_BYTES = 2**30
"""Outputs of the dense model that are kept; beyond this it runs again for each evaluation."""


def silent(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A Track that shows nothing."""
    return items


class Reference:
    """The dense model's outputs and predictions on batches, computed once, kept where they are not too large."""

    def __init__(self, task: Task, model: nn.Module, batches: Batches, track: Track = silent) -> None:
        self.task, self.model, self.batches = task, model, batches
        task.dense = model
        self._kept: list[Any] | None = []
        self.parts: list[Any] = [None] * len(batches.examples.features)
        self.losses: list[tuple[float, int]] = []
        size = 0
        for number in track(range(len(batches)), "dense model"):
            batch, output = _forward(task, model, batches, number, self.losses)
            _read(task, model, output, batch, batches.members(number), self.parts)
            if self._kept is not None:
                output = _on_cpu(output)
                size += sum(v.numel() * v.element_size() for v in output.values() if isinstance(v, torch.Tensor))
                self._kept.append(output)
                if size > MOST_BYTES:
                    self._kept = None
        self.predictions = _predictions(task, batches, self.parts)

    def output(self, number: int) -> Any:
        """The output of the dense model for a batch."""
        if self._kept is not None:
            return self._kept[number]
        return _on_cpu(_forward(self.task, self.model, self.batches, number, [])[1])

    def evaluation(self) -> Evaluation:
        """The dense model's own evaluation."""
        return _evaluation(self.task, self.batches, self.predictions, self.losses, self)


def evaluate(
    task: Task, model: nn.Module, batches: Batches, reference: Reference | None = None, track: Track = silent
) -> Evaluation:
    """Score a model; with `reference`, also how far it is from the dense model.

    Raises ModelError when the model answers NaN or infinity, or gives no output of the task; DataError when there are
    neither labels nor a dense model to compare with.
    """
    parts: list[Any] = [None] * len(batches.examples.features)
    losses: list[tuple[float, int]] = []
    divergences: list[np.ndarray] = []
    for number in track(range(len(batches)), "evaluate"):
        batch, output = _forward(task, model, batches, number, losses)
        _read(task, model, output, batch, batches.members(number), parts)
        if reference is not None:
            dense = reference.output(number)
            _check_shapes(output, dense)
            with torch.no_grad():
                divergences.append(task.divergence(output, _to(dense, model), batch).double().cpu().numpy())
    predictions = _predictions(task, batches, parts)
    return _evaluation(task, batches, predictions, losses, reference, divergences)


def divergences_of(task: Task, model: nn.Module, batches: Batches, number: int, reference: Reference) -> np.ndarray:
    """How far a model is from the dense one on a batch, for each of its examples in the batch's order, (examples,).

    Nothing is predicted or scored, so this is the cheapest comparison. NaN and infinity are given back as they are.
    """
    batch = with_decoder_inputs(model, to_device(batches[number], model))
    with evaluating(model), torch.no_grad():
        output = run(model, batch)
        dense = reference.output(number)
        _check_shapes(output, dense)
        return task.divergence(output, _to(dense, model), batch).double().cpu().numpy()


def parts_of(task: Task, model: nn.Module, batches: Batches, number: int) -> list[Any]:
    """For each feature of a batch, in its order, what a prediction is made from (`Task.read`); ModelError as there."""
    batch, output = _forward(task, model, batches, number, [])
    parts: list[Any] = [None] * len(batches.members(number))
    _read(task, model, output, batch, range(len(parts)), parts)
    return parts


# -- parts ------------------------------------------------------------------------------------------------------------


def _forward(
    task: Task, model: nn.Module, batches: Batches, number: int, losses: list[tuple[float, int]]
) -> tuple[dict[str, Any], Any]:
    """Run a batch: the batch on the model's device, and the output; its loss is added where there are labels."""
    batch = with_decoder_inputs(model, to_device(batches[number], model))
    with evaluating(model), torch.no_grad():
        if batches.are_labelled and not task.has_own_loss:
            output = call(model, batch)
            loss = output.loss
        else:
            output = run(model, batch)
            loss = task.loss(model, batch) if batches.are_labelled else None
    if loss is not None:
        losses.append((float(loss), len(batches.members(number))))
    return batch, output


def _read(task: Task, model: nn.Module, output: Any, batch: Any, members: Sequence[int], parts: list[Any]) -> None:
    """Keep of an output what predictions are made from; ModelError for NaN and infinity."""
    try:
        with evaluating(model), torch.no_grad():
            read = task.read(model, output, batch if task.reads_labels else without_labels(batch))
    except AttributeError as error:
        raise ModelError(f"a {type(model).__name__} gives no output for {task.name}: {error}") from error
    for member, part in zip(members, read, strict=True):
        if isinstance(part, np.ndarray) and part.dtype.kind == "f" and not np.isfinite(part).all():
            raise ModelError(
                "the model answers NaN or infinity on this data; look for NaN or huge values in its weights"
            )
        parts[member] = part


def _check_shapes(output: Any, dense: Any) -> None:
    """DataError where the two models have other classes."""
    for name in ("logits", "start_logits"):
        own, wanted = getattr(output, name, None), getattr(dense, name, None)
        if own is not None and wanted is not None and own.shape != wanted.shape:
            raise DataError(
                f"outputs of shape {tuple(own.shape)} and {tuple(wanted.shape)} cannot be compared; both models need "
                "the same classes"
            )


def _predictions(task: Task, batches: Batches, parts: Sequence[Any]) -> list[Any]:
    """The prediction of each row."""
    examples = batches.examples
    of_row: list[list[int]] = [[] for _ in range(examples.count)]
    for i, row in enumerate(examples.rows):
        of_row[row].append(i)
    return [task.predict([parts[i] for i in own], [examples.features[i] for i in own]) for own in of_row]


def _evaluation(
    task: Task,
    batches: Batches,
    predictions: Sequence[Any],
    losses: Sequence[tuple[float, int]],
    reference: Reference | None,
    divergences: Sequence[np.ndarray] = (),
) -> Evaluation:
    known = batches.examples.references
    wanted = known if known is not None else None if reference is None else reference.predictions
    if wanted is None:
        raise DataError(
            "the data has no labels; name their column, or pass the dense model to compare with (--against)"
        )
    metrics = task.metrics(has_references=known is not None)
    tables = {metric.name: metric.rows(predictions, wanted) for metric in metrics}
    flips = None if reference is None else _flips(task, predictions, reference.predictions)
    total = sum(count for _, count in losses)
    kl = float(np.concatenate(divergences).mean()) if divergences else None
    return Evaluation(
        task=task.name,
        rows=batches.examples.count,
        metric=metrics[0].name,
        values={metric.name: metric.whole(tables[metric.name]) for metric in metrics},
        is_against_dense=known is None,
        loss=sum(loss * count for loss, count in losses) / total if total else None,
        kl=0.0 if kl is None and reference is not None else kl,
        flips=flips,
        predictions=predictions,
        divergence=task.divergence_name,
        row_divergences=_of_rows(batches, divergences) if divergences else None,
        main=metrics[0],
        table=tables[metrics[0].name],
    )


def _of_rows(batches: Batches, divergences: Sequence[np.ndarray]) -> np.ndarray:
    """The divergence of each row (rows,), a mean over its features; NaN for rows of which none is known.

    divergences: of each batch, in the order of its members.
    """
    rows = np.asarray(batches.examples.rows)
    total, count = np.zeros(batches.examples.count), np.zeros(batches.examples.count)
    for number, values in enumerate(divergences):
        members = batches.members(number)
        if len(members) == len(values):
            np.add.at(total, rows[members], values)
            np.add.at(count, rows[members], 1)
    with np.errstate(invalid="ignore"):
        return total / count


def _flips(task: Task, predictions: Sequence[Any], dense: Sequence[Any]) -> float | None:
    """The share of rows whose answer is another one; None for a task without answers."""
    same = [task.same(a, b) for a, b in zip(predictions, dense, strict=True)]
    return None if any(s is None for s in same) else 1 - sum(float(s or 0) for s in same) / len(same)


def _on_cpu(output: Any) -> dict[str, Any]:
    """What a task may compare of an output: its tensors, without caches and hidden states."""
    from transformers.utils import ModelOutput

    items: Iterable[tuple[str, Any]] = [("logits", output)]
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = [(str(i), value) for i, value in enumerate(output)]
    kept = {k: v.detach().cpu() for k, v in items if isinstance(v, torch.Tensor) and k != "loss"}
    return ModelOutput(kept)


def _to(output: Any, model: nn.Module) -> Any:
    """An output on the device of a model."""
    return type(output)(to_device(dict(output), model))
