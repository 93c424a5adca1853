"""Batches, each a mapping of keyword arguments or a tuple of positional arguments: move, count and run them."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100
"""The label of positions that do not count in a loss."""


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
    """The batch without its labels, which only a loss needs."""
    return {k: v for k, v in batch.items() if k not in LABELS} if isinstance(batch, Mapping) else batch


def with_decoder_inputs(model: nn.Module, batch: Any) -> Any:
    """The batch with the decoder ids that an encoder-decoder makes from labels; a batch for another model is unchanged.

    The model's own method makes the ids if it has one; otherwise the labels move right by one, after the start token.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    config = getattr(model, "config", None)
    if (
        not isinstance(labels, torch.Tensor)
        or labels.dim() != 2
        or labels.is_floating_point()
        or not getattr(config, "is_encoder_decoder", False)
        or not {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(batch)
        or "decoder_input_ids" not in inspect.signature(model.forward).parameters
    ):
        return batch
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    return {**batch, "decoder_input_ids": make(labels) if make is not None else _shift_right(labels, config)}


def _shift_right(labels: torch.Tensor, config: Any) -> torch.Tensor:
    start, pad = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        raise DataError(
            "the config names no decoder_start_token_id or no pad_token_id; pass decoder_input_ids in each batch"
        )
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return ids.masked_fill(ids == IGNORED, pad)


def run(model: nn.Module, batch: Any) -> Any:
    """The output of a forward pass on the batch without its labels."""
    return call(model, without_labels(with_decoder_inputs(model, batch)))


def call(model: nn.Module, batch: Any) -> Any:
    """The output of a forward pass on the batch; labels among its keyword arguments go with it."""
    given = arguments(batch)
    return model(**given) if isinstance(given, Mapping) else model(*given)


def arguments(batch: Any) -> Any:
    """What a model is called with: the batch without names that start with `_`, which are notes of a task."""
    return {k: v for k, v in batch.items() if not str(k).startswith("_")} if isinstance(batch, Mapping) else batch


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode; at its end every module gets its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
