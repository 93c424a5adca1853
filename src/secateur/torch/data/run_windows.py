"""Runs language models over windows of tokens: loss of each window, KL and flips against a dense model."""

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
"""Positions whose probabilities are in memory at once."""

Answers = Callable[[torch.Tensor], torch.Tensor]
"""A window of tokens (context,) -> logits (context - 1, vocabulary): see `logits_of`."""


def evaluate_text(
    model: nn.Module,
    windows: torch.Tensor,
    reference: "nn.Module | Answers | None" = None,
    track: Any = lambda items, text: items,
) -> TextScore:
    """Score a causal language model on windows (count, context), one at a time.

    reference: the dense model, or a function that returns its logits.
    track: wraps the list of windows, with a word for what they are, to show progress.

    Raises DataError when the vocabularies of the two models differ, ModelError for a model without next-token logits
    (an encoder, or an encoder-decoder).
    """
    losses, dense_losses, kls, flips = [], [], [], []
    dense_model = reference if isinstance(reference, nn.Module) else model
    with torch.no_grad(), evaluating(model), evaluating(dense_model):
        for window in track(list(windows), "windows"):
            logits = logits_of(model, window)
            losses.append(_loss(logits, window))
            if reference is not None:
                in_torch = isinstance(reference, nn.Module)
                wanted = logits_of(reference, window) if in_torch else reference(window)
                if wanted.shape != logits.shape:
                    raise DataError(
                        f"the models have {logits.shape[-1]} and {wanted.shape[-1]} tokens; they cannot be compared"
                    )
                dense_losses.append(_loss(wanted, window))
                kl, flip = _distance(logits, wanted)
                kls.append(kl)
                flips.append(flip)
    against = (None, None, None) if reference is None else map(np.array, (dense_losses, kls, flips))
    return text_score(np.array(losses), windows.numpy(), *against)


def logits_of(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Logits (context - 1, vocabulary) for every token of a window but the first; ModelError where there are none."""
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
    """`count` positions in parts, each of which has its probabilities in memory at once."""
    return (slice(start, start + _POSITIONS) for start in range(0, count, _POSITIONS))


def _loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean negative log-likelihood of the tokens of a window but the first, in nats."""
    targets = window[1:].to(logits.device)
    total = sum(
        float(nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum").double())
        for part in chunks(len(targets))
    )
    return total / len(targets)


def _distance(logits: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """Mean over positions of KL(dense || model), and the share of positions with another most likely token."""
    kl = flips = 0.0
    for part in chunks(len(logits)):
        q, p = logits[part].float().log_softmax(-1), dense[part].float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        flips += float((logits[part].argmax(-1) != dense[part].argmax(-1)).sum())
    return kl / len(logits), flips / len(logits)
