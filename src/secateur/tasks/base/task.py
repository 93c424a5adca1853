"""Task: what a model is for. The base class that every task fills in, one a file, and the rows that it has encoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from secateur.data.columns import Choice, Column, choose
from secateur.data.table import Table, as_table
from secateur.metrics.evaluation import Evaluation
from secateur.metrics.metric import Metric
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, evaluate
from secateur.tasks.base.fisher import class_scores
from secateur.torch.base.batches import IGNORED, call
from secateur.torch.data.run_windows import divergences
from secateur.torch.data.text_rows import load_tokenizer


@dataclass(frozen=True)
class Options:
    """What a user chooses for a task; a task reads what concerns it.

    columns: role -> the name of its column, or several with commas between them; see `secateur.data.columns.choose`.
    max_length: the longest text in tokens.
    stride: tokens that two pieces of a long context share (question answering).
    new_tokens: the most tokens that a model generates for a row.
    label_names: the names of the classes in the order of the head, for a head that names none.
    seed: of what is random, such as the tokens that are masked.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    max_length: int = 128
    stride: int = 32
    new_tokens: int = 64
    label_names: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Examples:
    """Rows as a model takes them.

    features: what `Task.collate` makes a batch of; a row has one or more.
    rows: for each feature, which row it belongs to.
    references: for each row what is right, as the task's metrics take it; None where the data does not say.
    count: how many rows there are.
    inputs: for each row, what it was given, for a person.
    picture: row -> its image as Pillow has it, for a person; None where rows are no images.
    """

    features: Sequence[dict[str, Any]]
    rows: Sequence[int]
    references: Sequence[Any] | None
    count: int
    inputs: Sequence[str] = ()
    picture: Callable[[int], Any] | None = None

    def take(self, count: int) -> Examples:
        """The first `count` rows."""
        kept = [i for i, row in enumerate(self.rows) if row < count]
        return Examples(
            [self.features[i] for i in kept],
            [self.rows[i] for i in kept],
            None if self.references is None else self.references[:count],
            min(count, self.count),
            self.inputs[:count],
            self.picture,
        )


class Task(ABC):
    """What a model is for: how rows become batches, its loss, its metrics, and how its answers read.

    A task belongs to a model: it reads the config, and the processor (tokenizer, image processor, feature extractor).
    """

    name: ClassVar[str]
    """As transformers' pipelines are named."""
    auto_classes: ClassVar[tuple[str, ...]]
    """Whose models have this task: names of transformers' Auto classes without `AutoModelFor`."""
    columns: ClassVar[tuple[Column, ...]]
    """What it reads."""
    has_own_loss: bool = False
    """Whether `loss` is the task's own: the model computes none, or another one."""
    reads_labels: ClassVar[bool] = False
    """Whether `read` needs the labels of the batch, which it does not get otherwise."""
    divergence_name: ClassVar[str] = "KL"
    """What tables call `divergence`."""

    def __init__(self, model: nn.Module, processor: Any, options: Options | None = None) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.processor = processor
        self.options = options or Options()
        self.dense = model
        """The model whose answers stand in where the data has none; a `Reference` names the dense one."""
        self.notes: list[str] = []
        """Sentences for the user on what the task found out by itself."""

    is_supervised: ClassVar[bool] = True
    """Whether its models are trained on labels, so that a checkpoint of it has a head that is worth keeping."""

    @classmethod
    def new_head(cls, table: Table, options: Options) -> dict[str, Any]:
        """Options of `from_pretrained` for a new head that fits the data, such as names of classes."""
        return {}

    @classmethod
    def load_processor(cls, source: Any, **options: Any) -> Any:
        """What makes a model's inputs of rows, from a folder or hub id; ModelError when it is missing."""
        return load_tokenizer(source, **options)

    @property
    def companions(self) -> dict[str, Any]:
        """What is saved beside the weights, as arguments of `secateur.torch.files.saving.save`."""
        return {"tokenizer": self.processor}

    @property
    def is_stratified(self) -> bool:
        """Whether the label column holds one class a row, so that parts of the data take their share of each."""
        return False

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def choose(self, table: Table) -> Choice:
        """The columns of the table that the task reads; sentences on found ones go to `notes`."""
        chosen = choose(table, self.columns, self.options.columns)
        self.notes += [sentence for sentence in chosen.found if sentence not in self.notes]
        return chosen

    @abstractmethod
    def encode(self, table: Table) -> Examples:
        """Rows as features, with `labels` (or what the model calls them) where the table has what is right.

        Raises DataError, with the row, for a cell that does not fit the task or the model.
        """

    @abstractmethod
    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Features as one batch: keyword arguments of the model, labels among them.

        Tensors that the task alone needs, such as which positions count, have keys that start with `_`; no model gets
        them (`secateur.torch.base.batches.arguments`).

        pad_to: the length in tokens to which texts are padded; None for that of the longest.
        """

    def batches(self, rows: Any, batch_size: int = 32) -> Batches:
        """Rows as batches of like lengths. rows: a Table, or what `secateur.data.table.as_table` takes."""
        return Batches(self, self.encode(as_table(rows)), batch_size)

    def largest_batch(self, features: Sequence[Mapping[str, Any]]) -> int | None:
        """How many of the features a batch may hold for the size of the model's outputs; None for any number."""
        return None

    def length(self, feature: Mapping[str, Any]) -> int:
        """How long a feature is, for batches of like lengths."""
        ids = feature.get("input_ids")
        return len(ids) if ids is not None else 0

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a batch with labels, a mean over its examples; the model's own where it has one."""
        return call(model, batch).loss

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where the model decides among classes: pairs of logits (n, classes) and the example (n,) of each.

        Padding, and what a loss leaves out, is not among them.
        """
        logits = output.logits
        return [(logits, torch.arange(len(logits), device=logits.device))]

    def divergence(self, output: Any, dense: Any, batch: Mapping[str, Any], temperature: float = 1.0) -> torch.Tensor:
        """How far a model's output is from the dense model's, for each example (examples,): zero where they agree.

        KL(dense || model) in nats, a mean over the example's positions; tasks without classes say what theirs is.
        temperature: divides the logits first; the result is multiplied by its square (Hinton et al., 2015).
        """
        total: torch.Tensor | None = None
        pairs = zip(self.positions(output, batch), self.positions(dense, batch), strict=True)
        for (own, examples), (wanted, _) in pairs:
            part = mean_by(divergences(own, wanted, temperature), examples, _examples_of(batch))
            total = part if total is None else total + part
        assert total is not None
        return total

    def examples_of(self, batch: Mapping[str, Any]) -> int:
        """How many examples a batch has, as `divergence` counts them."""
        return _examples_of(batch)

    def decisions(self, batch: Mapping[str, Any]) -> int:
        """How many decisions of a model the divergence of a batch is a mean over."""
        return self.examples_of(batch)

    def fisher_loss(self, output: Any, batch: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        """A scalar, a sum over examples: the gradient s of an example's term has E[s s^T] = H, the Hessian of
        `divergence` at the model that gave the output. Labels of the data have no part in it.

        generator: on the CPU; draws the labels, see `secateur.tasks.base.fisher`.
        """
        total: torch.Tensor | None = None
        for logits, examples in self.positions(output, batch):
            positions = torch.bincount(examples, minlength=1).clamp_min(1)[examples]
            part = (class_scores(logits, generator) * positions.rsqrt()).sum()  # the divergence is a mean over them
            total = part if total is None else total + part
        assert total is not None
        return total

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Labels that call the model's own answers right, for losses on data without labels."""
        return {"labels": output.logits.argmax(-1)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def read(self, model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """For each feature of a batch, what of the output its prediction is made from; arrays and plain values."""
        return list(output.logits.float().cpu().numpy())

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Any:
        """The prediction of a row, from what `read` gave for its features; metrics compare it with the reference."""
        return int(np.argmax(parts[0]))

    def same(self, prediction: Any, other: Any) -> float | None:
        """Whether two predictions are the same answer, or which share of their answers is; None for a task without
        answers, such as embeddings.
        """
        return bool(prediction == other)

    @abstractmethod
    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """The metrics, the main one first; without references, those that compare with the dense model's answers."""

    @abstractmethod
    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """A prediction for a person and for JSON; the first value is the answer."""

    def answer(self, prediction: Any) -> str:
        """A prediction in a few words, without how likely it is."""
        return in_words(next(iter(self.shown(prediction, ()).values()), ""))

    def expected(self, reference: Any) -> str | None:
        """What is right for a row in a few words; None where nobody can read it."""
        texts = [reference] if isinstance(reference, str) else reference
        is_text = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        return " / ".join(texts) if is_text else None

    def evaluate(self, model: Any, batches: Batches, against: Any = None) -> Evaluation:
        """Score a model, or the model of a host, on batches; `against`: the dense model, or its host."""
        model, dense = (getattr(m, "model", m) if not isinstance(m, nn.Module) else m for m in (model, against))
        return evaluate(self, model, batches, None if dense is None else Reference(self, dense, batches))


def in_words(value: Any) -> str:
    """A value of `Task.shown` as a line: numbers to four digits, the items of lists one after the other."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(in_words(part) for name, part in value.items() if name in ("type", "text")) or ", ".join(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return str(value)


def mean_by(values: torch.Tensor, examples: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of the values (n,) of each example; 0 for an example without any."""
    zeros = values.new_zeros(count)
    total = zeros.index_add(0, examples, values)
    return total / zeros.index_add(0, examples, torch.ones_like(values)).clamp_min(1)


def _examples_of(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())


def at_labels(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (examples, positions, classes) at the positions whose label counts, and the example of each."""
    where = (labels != IGNORED).nonzero()
    return logits[where[:, 0], where[:, 1]], where[:, 0]
