"""Runs language models over windows of text: loss of each window, KL and flips against a dense model."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import DataError, ModelError
from secateur.scores import TextScore, text_score
from secateur.torch.base.batches import evaluating

_POSITIONS = 256
"""Positions of which the probabilities are held at once."""


Answers = Callable[[torch.Tensor], torch.Tensor]
"""A window of tokens (context,) -> logits (context - 1, vocabulary): see `logits_of`."""


def evaluate_text(
    model: nn.Module,
    windows: torch.Tensor,
    reference: "nn.Module | Answers | None" = None,
    track: Any = lambda items, text: items,
) -> TextScore:
    """Score a causal language model on windows (count, context), one at a time.

    reference: the dense model, or a function that knows what it answers. Raises DataError when the two have other
    vocabularies, ModelError for a model without next-token logits (an encoder, or an encoder-decoder).
    """
    losses, dense, kls, flips = [], [], [], []
    dense_model = reference if isinstance(reference, nn.Module) else model
    with torch.no_grad(), evaluating(model), evaluating(dense_model):
        for window in track(list(windows), "windows"):
            logits = logits_of(model, window)
            losses.append(_loss(logits, window))
            if reference is not None:
                known = isinstance(reference, nn.Module)
                wanted = logits_of(reference, window) if known else reference(window)
                if wanted.shape != logits.shape:
                    raise DataError(
                        f"the models have {logits.shape[-1]} and {wanted.shape[-1]} tokens; they cannot be compared"
                    )
                dense.append(_loss(wanted, window))
                kl, flip = _distance(logits, wanted)
                kls.append(kl)
                flips.append(flip)
    dense_losses = None if reference is None else np.array(dense)
    kl_mean, flip_mean = (None, None) if reference is None else (np.array(kls), np.array(flips))
    return text_score(np.array(losses), windows.numpy(), dense_losses, kl_mean, flip_mean)


def logits_of(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Logits (context - 1, vocabulary) for every token of a window but the first."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("perplexity is of decoders; an encoder-decoder has none on plain text")
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = next(model.parameters()).device
    ids = window[None].to(device)
    logits = getattr(model(input_ids=ids, attention_mask=torch.ones_like(ids), **options), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ModelError(f"{type(model).__name__} gives no logits for each token; load it with --task CausalLM")
    return logits[0, :-1]


def chunks(count: int) -> Iterator[slice]:
    """Positions in parts of which the probabilities are held at once."""
    return (slice(start, start + _POSITIONS) for start in range(0, count, _POSITIONS))


def _loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    targets = window[1:].to(logits.device)
    total = sum(
        float(nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum").double())
        for part in chunks(len(targets))
    )
    return total / len(targets)


def _distance(logits: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """KL(dense || model) and the share of other first choices, means over positions."""
    kl = flips = 0.0
    for part in chunks(len(logits)):
        q, p = logits[part].float().log_softmax(-1), dense[part].float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        flips += float((logits[part].argmax(-1) != dense[part].argmax(-1)).sum())
    return kl / len(logits), flips / len(logits)
