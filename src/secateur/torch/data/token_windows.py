"""Text as windows of tokens, all of one length: for calibration and for perplexity."""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from secateur.errors import DataError


def tokens_of(tokenizer: Any, texts: Sequence[str], vocabulary: int, limit: int | None = None) -> list[int]:
    """Token ids of documents one after the other, each followed by the token that ends a text where there is one.

    vocabulary: how many tokens the model knows; DataError for a token beyond it.
    limit: no more documents are read once there are so many tokens.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tokens: list[int] = []
    for start in range(0, len(texts), 64):
        for ids in tokenizer(list(texts[start : start + 64]), verbose=False)["input_ids"]:
            tokens += ids
            if end is not None and ids and ids[-1] != end:
                tokens.append(end)
        if limit is not None and len(tokens) >= limit:
            break
    largest = max(tokens, default=0)
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, the model knows {vocabulary}; they do not belong together"
        )
    return tokens


def cut(tokens: Sequence[int], context: int, name: str, most: int | None = None) -> torch.Tensor:
    """Windows (count, context) that do not overlap, at most `most`; tokens beyond the last are not used.

    DataError, with the name of the text, when there are fewer tokens than one window has.
    """
    count = len(tokens) // context if most is None else min(len(tokens) // context, most)
    if count == 0:
        raise DataError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {context}; use more text or a smaller --context"
        )
    return torch.tensor(tokens[: count * context], dtype=torch.long).reshape(count, context)


def sample_windows(
    tokenizer: Any, sources: Sequence[tuple[str, Sequence[str]]], vocabulary: int, samples: int, context: int, seed: int
) -> torch.Tensor:
    """Calibration windows, equally many from each source (name, documents), in a random order that the seed decides.

    Returns fewer than `samples` where the texts are short. DataError when a source has less than one window.
    """
    parts = []
    for number, (name, texts) in enumerate(sources):
        share = samples // len(sources) + (number < samples % len(sources))
        if share == 0:
            continue
        order = np.random.default_rng([seed, number]).permutation(len(texts))
        tokens = tokens_of(tokenizer, [texts[i] for i in order], vocabulary, share * context)
        parts.append(cut(tokens, context, name, share))
    windows = torch.cat(parts)
    return windows[torch.as_tensor(np.random.default_rng(seed).permutation(len(windows)))]


def check_context(positions: int | None, context: int) -> None:
    """DataError when a model has fewer positions than a window has tokens."""
    if positions is not None and context > positions:
        raise DataError(
            f"windows of {context} tokens exceed the {positions} positions of the model; use a context of at most "
            f"{positions}"
        )


def batches_of(model: Any, windows: torch.Tensor, size: int) -> list[dict[str, Any]]:
    """Batches of `size` windows as keyword arguments of the model.

    An encoder-decoder reads the first half of a window and writes the second.
    """
    batches = []
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    for start in range(0, len(windows), size):
        ids = windows[start : start + size]
        batch: dict[str, Any] = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            half = ids.shape[1] // 2
            batch = {"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batches.append({**batch, "use_cache": False} if has_cache else batch)
    return batches


def windows_hash(windows: torch.Tensor | None) -> str:
    """SHA-256 of the tokens; `none` where there are no windows."""
    return "none" if windows is None else hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
