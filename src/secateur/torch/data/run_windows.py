"""Runs language models over windows of tokens: loss of each window, KL and flips against a dense model. Logits are
large, so that probabilities of some positions only are in memory at once.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secateur.errors import DataError, ModelError
from secateur.scores import TextScore, text_score
from secateur.torch.base.batches import evaluating

_POSITIONS = 256
"""Positions whose probabilities are in memory at once."""

KEPT_BYTES = 2**30
"""The most memory for what `recorded` keeps."""

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


def recorded(model: nn.Module, windows: torch.Tensor, track: Any = lambda items, text: items) -> Answers:
    """The logits of a model on windows (count, context), to compare several models with it: it runs once, and then only
    its output layer does.

    A model that computes its logits otherwise, or whose states would take more than `KEPT_BYTES`, runs again each time.
    Raises ModelError as `evaluate_text` does.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    width = getattr(head, "in_features", 0)
    if not width or windows.numel() * width * 4 > KEPT_BYTES:
        return _again(model)
    states: dict[bytes, torch.Tensor] = {}
    with torch.no_grad(), evaluating(model):
        for window in track(list(windows), "windows"):
            seen: list[torch.Tensor] = []
            hook = head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
            try:
                logits = logits_of(model, window)
            finally:
                hook.remove()
            if len(seen) != 1 or seen[0].shape[:2] != (1, len(window)):
                return _again(model)
            state = seen[0][0, :-1].clone()
            if not torch.allclose(head(state), logits, rtol=1e-3, atol=1e-3):
                return _again(model)
            states[window.numpy().tobytes()] = state
    return lambda window: head(states[window.numpy().tobytes()])


def _again(model: nn.Module) -> Answers:
    """The logits of a model that runs each time."""

    def answers(window: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), evaluating(model):
            return logits_of(model, window)

    return answers


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


def loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The negative log-likelihood of the targets (positions,) under logits (positions, vocabulary), summed, in nats."""
    targets = targets.to(logits.device)
    return sum(
        float(F.cross_entropy(logits[part].float(), targets[part], reduction="sum").double())
        for part in chunks(len(targets))
    )


def divergences(logits: torch.Tensor, dense: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(dense || model) at each position (positions,), in nats, of logits (positions, vocabulary).

    temperature: divides the logits first; the result is multiplied by its square.

    Where gradients are recorded, the probabilities of each part are computed again on the way back.
    """
    parts = []
    for part in chunks(len(logits)):
        if torch.is_grad_enabled() and logits.requires_grad:
            parts.append(checkpoint(_kl, logits[part], dense[part], temperature, use_reentrant=False))
        else:
            parts.append(_kl(logits[part], dense[part], temperature))
    return torch.cat(parts) if parts else logits.new_zeros(0)


def _kl(logits: torch.Tensor, dense: torch.Tensor, temperature: float) -> torch.Tensor:
    q, p = ((x.float() / temperature).log_softmax(-1) for x in (logits, dense))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def _loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean negative log-likelihood of the tokens of a window but the first, in nats."""
    return loss_sum(logits, window[1:]) / (len(window) - 1)


def _distance(logits: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """Mean over positions of KL(dense || model), and the share of positions with another most likely token."""
    flips = sum(float((logits[p].argmax(-1) != dense[p].argmax(-1)).sum()) for p in chunks(len(logits)))
    return float(divergences(logits, dense).double().sum()) / len(logits), flips / len(logits)
