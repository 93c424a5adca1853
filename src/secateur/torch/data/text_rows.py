"""Rows of text as batches for a Hugging Face model: tokenised, sorted by length where order is free, padded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import DataError, ModelError
from secateur.labelled_rows import Rows, label_ids
from secateur.torch.base import remote_code

VOCABULARIES = ("tokenizer.json", "*vocab*", "*.model", "*.tiktoken", "tokenizer_config.json")
"""Files of which a tokenizer has at least one; without any, transformers makes a tokenizer that knows no word."""


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a folder has files of a tokenizer, even if damaged or incomplete."""
    return any(file for name in VOCABULARIES for file in Path(folder).glob(name))


def load_tokenizer(source: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id; ModelError when there is none, or it needs code that is not allowed."""
    from transformers import AutoTokenizer  # optional

    if Path(source).is_dir() and not has_tokenizer(source):
        raise ModelError(f"{source} holds no tokenizer; save the one that the model was trained with into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote_code.stated(trust_remote_code))
    except Exception as error:  # damaged files raise many types of exception
        remote_code.check(source, error)
        raise ModelError(f"{source} holds no tokenizer: {' '.join(str(error).split())[:200]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {source} has no padding token and none that ends a text; give it one")
    return tokenizer


def text_positions(model: nn.Module) -> int | None:
    """How many tokens a text may have, or None where the config does not say it.

    RoBERTa and models like it number positions from the padding index of their table on, so that they cannot use the
    rows before it.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    ids = _input_embeddings(model)
    skipped = [
        table.padding_idx + 1
        for table in model.modules()
        if table is not ids and getattr(table, "padding_idx", None) is not None
        if (weight := getattr(table, "weight", None)) is not None and weight.shape[0] == positions
    ]
    return positions - max(skipped, default=0)


def _input_embeddings(model: Any) -> Any:
    """The table of token embeddings, or None where the model has none."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def token_ids(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int, new_tokens: int = 0) -> Any:
    """The output of the tokenizer for texts, cut to `max_length` tokens; `new_tokens`: how many the model will add.

    Raises DataError for a text that needs more positions than the model has, for a text without a token, and for a
    token that the model does not know.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=min(max_length, tokenizer.model_max_length))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    positions = text_positions(model)
    if positions is not None and max(lengths) > positions:
        raise DataError(
            f"a text has {max(lengths)} tokens, the model {positions} positions; pass --max-length {positions}"
        )
    if positions is not None and max(lengths) + new_tokens > positions:
        raise DataError(
            f"a text of {max(lengths)} tokens and {new_tokens} new ones exceed the {positions} positions of the model; "
            "ask for fewer new tokens, or pass a smaller --max-length"
        )
    if min(lengths) == 0:
        number = lengths.index(0)
        raise DataError(f"row {number} gives no token: {texts[number]!r}; remove it")
    largest = max(max(ids) for ids in encoded["input_ids"])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {largest}, the model knows {vocabulary}; they do not belong together"
        )
    return encoded


def encode(model: nn.Module, tokenizer: Any, rows: Rows, max_length: int) -> list[dict[str, Any]]:
    """One mapping of features for each row, with `labels` where the rows have labels.

    Raises DataError when labels do not fit the head of the model, or texts do not fit the model (see `token_ids`).
    """
    labels = None
    if rows.labels is not None:
        config: Any = model.config
        labels = label_ids(rows, config.label2id, config.num_labels)
    encoded = token_ids(model, tokenizer, rows.texts, max_length)
    features = [{key: encoded[key][i] for key in encoded} for i in range(len(rows))]
    if labels is not None:
        for feature, label in zip(features, labels, strict=True):
            feature["labels"] = label
    return features


class Batches(Sequence[dict[str, torch.Tensor]]):
    """Features in batches, ordered by length so that little is padded; can be iterated many times.

    pad_to: the length of every batch; None: that of its longest row.
    """

    def __init__(
        self, features: list[dict[str, Any]], tokenizer: Any, batch_size: int, pad_to: int | None = None
    ) -> None:
        order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
        self._features = [features[i] for i in order]
        self._tokenizer, self._size, self._pad_to = tokenizer, batch_size, pad_to

    def __len__(self) -> int:
        return -(-len(self._features) // self._size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = self._features[index * self._size : (index + 1) * self._size]
        padding: Any = "max_length" if self._pad_to else True
        return dict(self._tokenizer.pad(part, padding=padding, max_length=self._pad_to, return_tensors="pt"))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def labels(self) -> np.ndarray:
        """Class numbers in the order of the batches."""
        return np.array([feature["labels"] for feature in self._features])
