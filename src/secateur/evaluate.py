"""Scores of outputs: accuracy, and how far a model has moved from the dense one (KL, flips)."""

from dataclasses import dataclass

import numpy as np

from secateur.errors import DataError


@dataclass(frozen=True)
class Score:
    """Result on labelled examples. `kl` in nats and `flips` (share of changed answers) are against the dense model."""

    accuracy: float
    loss: float
    examples: int
    kl: float | None = None
    flips: float | None = None


def score(logits: np.ndarray, labels: np.ndarray, dense: np.ndarray | None = None) -> Score:
    """Score logits of shape (examples, classes) against class numbers, and against the dense model's logits."""
    if dense is not None and dense.shape != logits.shape:
        raise DataError(
            f"outputs of shape {logits.shape} and {dense.shape} cannot be compared; both models need the same classes"
        )
    log_p = log_softmax(logits)
    answers = logits.argmax(-1)
    kl = flips = None
    if dense is not None:
        log_q = log_softmax(dense)
        kl = float((np.exp(log_q) * (log_q - log_p)).sum(-1).mean())
        flips = float((answers != dense.argmax(-1)).mean())
    loss = float(-log_p[np.arange(len(labels)), labels].mean())
    return Score(float((answers == labels).mean()), loss, len(labels), kl, flips)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last dimension, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
