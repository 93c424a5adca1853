"""Where the tokens of a text stand in it, and values of single tokens as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.errors import ModelError


def need_offsets(tokenizer: Any, task: str) -> None:
    """ModelError for a tokenizer that does not say where its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{task} needs to know where tokens stand in a text, which a {type(tokenizer).__name__} does not tell; "
            "save a fast tokenizer (tokenizer.json) with the model"
        )


def beside(tokenizer: Any, rows: Sequence[Sequence[Any]], length: int, padding: Any) -> torch.Tensor:
    """Values of the tokens of each feature as a tensor (features, length), padded on the side of the token ids."""
    is_left = tokenizer.padding_side == "left"
    filled = [[padding] * (length - len(row)) for row in rows]
    return torch.tensor([[*fill, *row] if is_left else [*row, *fill] for row, fill in zip(rows, filled, strict=True)])
