"""Answers at the positions of a text, from logits that are too large to be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.data.columns import texts
from secateur.data.table import Table
from secateur.errors import DataError, ModelError
from secateur.metrics.texts import Tokens, perplexity_of
from secateur.torch.data.run_windows import chunks, loss_sum

MOST_LOGITS = 2**30
"""Bytes of the logits of a batch, in float32."""


def tokens_at(logits: torch.Tensor, targets: torch.Tensor | None) -> Tokens:
    """The most likely token at each position, and the loss of the targets (positions,) where they are known.

    logits: (positions, vocabulary). Raises ModelError for NaN and infinity.
    """
    parts = [logits[part].argmax(-1).cpu().numpy() for part in chunks(len(logits))]
    loss = 0.0 if targets is None else loss_sum(logits, targets)
    if not math.isfinite(loss):
        raise ModelError("the model answers NaN or infinity on this data; look for NaN or huge values in its weights")
    return Tokens(np.concatenate(parts) if parts else np.zeros(0, np.int64), loss)


def shown_tokens(prediction: Tokens, processor: Any, *, has_loss: bool) -> dict[str, Any]:
    """The answers as words, and the perplexity where the right tokens are known."""
    shown: dict[str, Any] = {"tokens": processor.convert_ids_to_tokens(prediction.answers.tolist())}
    return {**shown, "perplexity": perplexity_of(prediction.loss / len(prediction.answers))} if has_loss else shown


def same_tokens(prediction: Tokens, other: Tokens) -> float:
    """The share of positions with the same answer."""
    return float((prediction.answers == other.answers).mean()) if len(other.answers) else 1.0


def batch_for(model: nn.Module, positions: int) -> int:
    """How many texts of so many positions a batch may hold for the size of its logits; at least one."""
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1
    return max(1, MOST_LOGITS // (4 * max(1, positions) * vocabulary))


def longest(features: Sequence[Mapping[str, Any]], name: str) -> int:
    """The length of the longest list of that name."""
    return max((len(feature[name]) for feature in features), default=1)


def documents(table: Table, names: Sequence[str]) -> list[str]:
    """The texts of one column without the empty ones; DataError for several columns, and where nothing is left."""
    if len(names) > 1:
        raise DataError(f"--text-column names {len(names)} columns; this task reads one")
    cells = table.column(names[0])
    rows = [row for row, cell in enumerate(cells) if cell is not None and str(cell).strip()]
    if not rows:
        raise DataError(f"{table.source} holds no text in column {names[0]!r}")
    return texts(table if len(rows) == len(table) else table.take(rows), names[0])


def filled(rows: Sequence[Sequence[int]], value: int, size: int | None = None) -> torch.Tensor:
    """Rows as one tensor (rows, size), filled up at their ends; size: None for that of the longest."""
    size = max(map(len, rows)) if size is None else size
    return torch.tensor([[*row, *[value] * (size - len(row))] for row in rows], dtype=torch.long)
