"""What a program is compared on: rows of a table as the model's task encodes them, or batches of tensors.

Labels are left out: an exported program takes none, and no label that is wrong should stop an export.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.data.table import Table
from secateur.deploy.jobs.results import BATCHES
from secateur.deploy.target import DeployError, Port, Target
from secateur.deploy.targets.inputs import longest
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.inputs import without_references
from secateur.tasks.base.task import Examples, Options, Task
from secateur.tasks.find import kind_of
from secateur.torch.base.batches import by_name, with_decoder_inputs, without_labels

Inputs = dict[str, torch.Tensor]
ROWS = 2
"""Rows of an example and prompts of a generation."""


class Encoded:
    """Rows of a table as a task has encoded them."""

    def __init__(self, model: nn.Module, task: Task, examples: Examples) -> None:
        self.model, self.task, self.examples = model, task, examples

    @property
    def first(self) -> Inputs:
        """A batch of the first rows."""
        return inputs_for(self.model, self.task.collate(self.examples.features[:ROWS]))

    def batches(self, target: Target, ports: Sequence[Port]) -> Iterator[Inputs]:
        """Batches of several sizes and lengths; for a target of one shape padded to it, the last batch filled up."""
        lead = next((port for port in ports if len(port.shape) == 2 and port.fill == "ids"), ports[0])
        rows, is_fixed = lead.shape[0], target.shapes == "fixed"
        width = lead.shape[1] if len(lead.shape) == 2 and lead.fill == "ids" else None
        features = sorted(self.examples.features, key=self.task.length)
        start = 0
        for size in itertools.cycle([rows] if isinstance(rows, int) else BATCHES):
            part = features[start : start + min(size, lead.at_most.get(0, size))]
            if not part:
                return
            start += len(part)
            if is_fixed:
                part = [part[i % len(part)] for i in range(size)]
            batch = self.task.collate(part, pad_to=width if isinstance(width, int) else None)
            yield inputs_for(self.model, batch)

    def prompts(self) -> Inputs:
        """Prompts of unequal length: padded on the left where the model goes on with them."""
        config: Any = self.model.config
        texts = list(self.examples.inputs[:ROWS])
        if config.is_encoder_decoder or not texts:
            return self.first
        tokenizer = self.task.processor
        side_before = tokenizer.padding_side
        tokenizer.padding_side = "left"
        try:
            return dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=32))
        finally:
            tokenizer.padding_side = side_before


class Given:
    """Batches of the user, in any form of `secateur.torch.base.batches`."""

    def __init__(self, model: nn.Module, data: Iterable[Any]) -> None:
        self.model = model
        batches = iter(data)
        head = list(itertools.islice(batches, 1))
        if not head:
            raise DeployError("the data is empty; pass at least one batch of it, or leave it out")
        self.first = inputs_for(model, head[0])
        self._all = itertools.chain(head, batches)

    def batches(self, target: Target, ports: Sequence[Port]) -> Iterator[Inputs]:
        """The batches as they are."""
        return (inputs_for(self.model, batch) for batch in self._all)

    def prompts(self) -> Inputs:
        """The first batch."""
        return self.first


Material = Encoded | Given


def inputs_for(model: nn.Module, batch: Any) -> Inputs:
    """The inputs of a model by name, with those that it makes of labels, and without the labels."""
    return dict(without_labels(by_name(model, with_decoder_inputs(model, batch))))


def read(
    model: nn.Module,
    data: Any,
    source: Path | str | None,
    *,
    processor: Any = None,
    task: str | None = None,
    options: Options | None = None,
    length: int | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Material | None:
    """The data as material; None where there is none.

    data: a Table, Batches of a task, or an iterable of batches of tensors.
    source: where the processor lies. processor: wins over it.
    task, options: name the task of a table, and say what a user wants of it; for the rest see `secateur.tasks.find`.
    length: the longest text in tokens.
    loading: options for loading the processor.

    Raises ModelError when no task is known for the model, DataError for rows that do not fit it.
    """
    if data is None:
        return None
    if isinstance(data, Batches) and type(data).__getitem__ is Batches.__getitem__:  # it holds features to collate
        return Encoded(model, data.task, data.examples)
    if not isinstance(data, Table):
        return Given(model, data)
    kind = kind_of(model, task)
    if processor is None:
        if source is None:
            raise DeployError(
                "rows of a table need the model's tokenizer or other processor; pass processor=, or batches of tensors"
            )
        processor = kind.load_processor(source, **(loading or {}))
    found = kind(model, processor, replace(options or Options(), max_length=longest(model, length)))
    return Encoded(model, found, found.encode(without_references(data, kind.columns, found.options.columns)))
