"""Scores of language models on plain text: perplexity, and how far a model is from the dense model (KL, flips)."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.errors import DataError

COLLAPSE = 2.0
"""How many times the dense model's perplexity is a collapse, where a table of tokens does better than both."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last dimension, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@dataclass(frozen=True)
class TextScore:
    """Result on windows that do not overlap. Means are over predicted tokens, in nats; every window predicts all of its
    tokens but the first.

    context: tokens in a window.
    windows, tokens: how many of them, and how many tokens were predicted.
    loss, perplexity: mean negative log-likelihood, and its exponential.
    unigram: loss of a model that knows only how often each token occurs in this text.
    dense_perplexity: that of the dense model.
    delta: mean over windows of the difference in negative log-likelihood to the dense model.
    interval: 95% interval of delta (paired, normal, over windows; None for a single window).
    kl: KL divergence from the dense model to this one.
    flips: share of positions at which the two models find another token most likely.
    losses, dense_losses: of each window, for paired comparisons with other models.
    """

    context: int
    windows: int
    tokens: int
    loss: float
    perplexity: float
    unigram: float
    dense_perplexity: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    flips: float | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    dense_losses: tuple[float, ...] = field(default=(), repr=False)

    @property
    def collapsed(self) -> str | None:
        """Why a model with this score is of no use as a language model, or None.

        A text on which the dense model too does worse than a table of tokens says nothing about pruning: there the
        model has collapsed when its perplexity is more than `COLLAPSE` times that of the dense model.
        """
        if not math.isfinite(self.loss):
            return "its loss is not a finite number"
        if self.loss <= self.unigram:
            return None
        dense = None if self.delta is None else self.loss - self.delta
        if dense is not None and dense > self.unigram:
            if self.loss - dense <= math.log(COLLAPSE):
                return None
            return (
                f"its perplexity ({self.perplexity:.1f}) is more than {COLLAPSE:g} times that of the dense model "
                f"({self.dense_perplexity:.1f})"
            )
        return (
            f"it predicts worse (perplexity {self.perplexity:.1f}) than a table of how often each token occurs in "
            f"this text ({math.exp(self.unigram):.1f})"
        )


def text_score(
    losses: np.ndarray,
    tokens: np.ndarray,
    dense: np.ndarray | None = None,
    kl: np.ndarray | None = None,
    flips: np.ndarray | None = None,
) -> TextScore:
    """The score of a model from its losses.

    losses (windows,): negative log-likelihood of each window, mean over its predicted tokens.
    tokens (windows, context): token ids.
    dense (windows,): losses of the dense model.
    kl, flips (windows,): means over the predicted tokens of each window.

    Raises DataError when losses and windows differ in number.
    """
    windows, context = tokens.shape
    if losses.shape != (windows,) or (dense is not None and dense.shape != (windows,)):
        raise DataError(f"{len(losses)} losses do not belong to {windows} windows")
    loss = float(losses.mean())
    score: dict[str, Any] = {
        "context": context,
        "windows": windows,
        "tokens": windows * (context - 1),
        "loss": loss,
        "perplexity": _exp(loss),
        "unigram": unigram_loss(tokens[:, 1:]),
        "losses": tuple(losses.tolist()),
    }
    if dense is not None:
        difference = losses - dense
        score["dense_losses"] = tuple(dense.tolist())
        score["dense_perplexity"] = _exp(float(dense.mean()))
        score["delta"] = float(difference.mean())
        score["interval"] = interval_of(difference)
    if kl is not None and flips is not None:
        score |= {"kl": float(kl.mean()), "flips": float(flips.mean())}
    return TextScore(**score)


def interval_of(values: np.ndarray) -> tuple[float, float] | None:
    """95% interval of the mean, normal approximation; None for a single value."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def unigram_loss(tokens: np.ndarray) -> float:
    """Entropy of the frequencies of the tokens, in nats."""
    counts = np.unique(tokens, return_counts=True)[1].astype(np.float64)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
