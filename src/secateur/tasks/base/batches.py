"""Examples as batches of like lengths, which can be iterated many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from secateur.torch.base.batches import LABELS, evaluating, run, to_device

if TYPE_CHECKING:
    from secateur.tasks.base.task import Examples, Task


class Batches(Sequence[dict[str, torch.Tensor]]):
    """Examples in batches, ordered by length so that little is padded.

    examples: the rows.
    task: which collates them.
    batch_size: the most examples of a batch; fewer where the task says so.
    """

    def __init__(self, task: Task, examples: Examples, batch_size: int = 32) -> None:
        lengths = [task.length(feature) for feature in examples.features]
        self.order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        most = task.largest_batch(examples.features)
        self.task, self.examples = task, examples
        self.batch_size = batch_size if most is None else min(batch_size, most)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        return self.task.collate([self.examples.features[i] for i in self.members(index)])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def members(self, index: int) -> list[int]:
        """Which features a batch holds, as positions in `examples.features`; IndexError beyond the last batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]

    @property
    def are_labelled(self) -> bool:
        """Whether features hold labels, so that the model can compute a loss."""
        return bool(self.examples.features) and not set(LABELS).isdisjoint(self.examples.features[0])


class OwnLabels(Sequence[dict[str, torch.Tensor]]):
    """Batches without labels, to which each time the answers of a model are added as labels.

    model: the model, in evaluation mode.
    """

    def __init__(self, task: Task, batches: Batches, model: torch.nn.Module) -> None:
        self.task, self.batches, self.model = task, batches, model

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        batch = to_device(self.batches[index], self.model)
        with evaluating(self.model), torch.no_grad():
            return {**batch, **self.task.own_labels(run(self.model, batch), batch)}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))
