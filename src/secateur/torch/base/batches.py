"""Batches in every form that people hold: what a model is called with, and how they are moved, counted and run.

A batch is a mapping of keyword arguments, a tuple or list of positional arguments, or a single tensor. Where it has one
part more than the model takes, as `(x, y)` of a data set for a model of `x`, the last part is the labels.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError, shown

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100
"""The label of positions that do not count in a loss."""


def arguments(model: nn.Module, batch: Any) -> dict[str, Any] | tuple[Any, ...]:
    """What the model is called with: keyword arguments by name, or positional ones, without labels behind them.

    Labels stay where the model takes them by name, to compute a loss. Names that start with `_` are notes of a task;
    "0", "1", ... are positional arguments in a mapping.

    Raises DataError for what is no batch, and for more parts than the model takes and labels.
    """
    whole = _of_two_forms(batch)
    if isinstance(whole, dict):
        spare = () if _takes_any_name(model) else {*LABELS} - {*inspect.signature(model.forward).parameters}
        return _numbered(model, {k: v for k, v in whole.items() if k not in spare and not str(k).startswith("_")})
    names = _positional(model)
    if names is None or len(whole) <= len(names):
        return whole
    if len(whole) > len(names) + 1:
        raise DataError(
            f"a batch has {len(whole)} parts, but {type(model).__name__} takes {', '.join(names) or 'nothing'}; pass "
            "these, and labels at most"
        )
    return whole[:-1]


def _numbered(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
    """Keyword arguments in which positional ones have their names; a tuple where the forward pass names none."""
    numbers = [k for k in given if str(k).isdigit()]
    if not numbers:
        return given
    names, positional = _positional(model), tuple(given[k] for k in numbers)
    rest = {k: v for k, v in given.items() if k not in numbers}
    return positional if names is None else {**dict(zip(names, positional, strict=False)), **rest}


def by_name(model: nn.Module, batch: Any) -> dict[str, Any]:
    """`arguments` by the names that the model's forward pass gives them; DataError where it names none."""
    found = arguments(model, batch)
    if isinstance(found, dict):
        return found
    names = _positional(model)
    if names is None:
        raise DataError(f"{type(model).__name__} names no inputs; pass batches with names: {{'x': tensor}}")
    return dict(zip(names, found, strict=False))


def _of_two_forms(batch: Any) -> dict[str, Any] | tuple[Any, ...]:
    """The whole batch as a dict or as a tuple."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, str | bytes):
        raise DataError(f"{shown(batch)} is no batch; pass a list of batches, each of tensors")
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _positional(model: nn.Module) -> list[str] | None:
    """Names of the arguments that the forward pass takes by position; None where it takes any number."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _takes_any_name(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def to_device(batch: Any, model: nn.Module) -> Any:
    """The whole batch, as a dict or a tuple, with its tensors on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = _of_two_forms(batch)
    if isinstance(whole, dict):
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in whole)


def size_of(batch: Any) -> int:
    """Number of examples in a batch."""
    whole = _of_two_forms(batch)
    values = whole.values() if isinstance(whole, dict) else whole
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


def frame_mask(model: Any, mask: Any, count: int) -> torch.Tensor | None:
    """Which of `count` frames of each example are not padding, as bool (examples, count), where a model reads frames.

    mask: the attention mask (examples, length) of what the frames are made from, such as the samples of sounds.

    None without a mask, and where the model does not say how the frames follow from what it reads.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    if mask.shape[1] == count:
        return mask.bool()
    for candidate in (model, getattr(model, "base_model", None)):
        if make := getattr(candidate, "_get_feature_vector_attention_mask", None):
            return torch.as_tensor(make(count, mask)).bool()
        if make := getattr(candidate, "_get_output_attention_mask", None):
            return torch.as_tensor(make(mask, target_length=count)).bool()
    return None


def run(model: nn.Module, batch: Any) -> Any:
    """The output of a forward pass on the batch without its labels."""
    return call(model, without_labels(with_decoder_inputs(model, batch)))


def call(model: nn.Module, batch: Any) -> Any:
    """The output of a forward pass on the batch; labels among its keyword arguments go with it.

    A mapping may hold positional arguments too, under the names "0", "1", ..., in this order.
    """
    given = arguments(model, batch)
    if not isinstance(given, dict):
        return model(*given)
    positional = [value for name, value in given.items() if name.isdigit()]
    return model(*positional, **{name: value for name, value in given.items() if not name.isdigit()})


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
