"""What a batch is: a mapping of keyword arguments, or a tuple of positional ones; moved, measured, run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100
"""The label of positions that do not count."""


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch with its tensors on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    items = batch if isinstance(batch, tuple | list) else (batch,)
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in items)


def size_of(batch: Any) -> int:
    """Number of examples in a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((int(v.shape[0]) for v in values if isinstance(v, torch.Tensor) and v.dim()), 1)


def without_labels(batch: Any) -> Any:
    """The batch without what only a loss needs."""
    return {k: v for k, v in batch.items() if k not in LABELS} if isinstance(batch, Mapping) else batch


def run(model: nn.Module, batch: Any) -> Any:
    """Forward pass without labels."""
    batch = without_labels(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; the training flag of every module is put back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
