"""Texts for a Hugging Face model: its tokenizer, how many tokens it takes, texts as ids, ids padded to a batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError, ModelError, shown
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
    ids = input_embeddings(model)
    skipped = [
        table.padding_idx + 1
        for table in model.modules()
        if table is not ids and getattr(table, "padding_idx", None) is not None
        if (weight := getattr(table, "weight", None)) is not None and weight.shape[0] == positions
    ]
    return positions - max(skipped, default=0)


def input_embeddings(model: Any) -> Any:
    """The table of token embeddings, or None where the model has none."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if hasattr(table, "weight") else None


def token_ids(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    max_length: int,
    new_tokens: int = 0,
    *,
    pairs: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """The output of the tokenizer for texts, cut to `max_length` tokens.

    new_tokens: how many tokens the model will add.
    pairs: the second text of each pair; the longer one of a pair is cut first.
    options: more options of the tokenizer; `truncation` among them replaces that of texts and pairs.

    Raises DataError for a text that needs more positions than the model has, for a text without a token, and for a
    token that the model does not know.
    """
    if not len(texts):
        raise DataError("there are no texts")
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise ModelError(f"a {type(model).__name__} reads {reads}, not texts; name another task with --task")
    limit = min(max_length, tokenizer.model_max_length)
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    encoded = tokenizer(*arguments, **{"truncation": True, "max_length": limit, **options})
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
        raise DataError(f"row {number} gives no token: {shown(texts[number])}; remove it")
    check_vocabulary(model, max(max(ids) for ids in encoded["input_ids"]))
    return encoded


def check_vocabulary(model: Any, largest: int) -> None:
    """DataError when a token is not in the model's table."""
    table = input_embeddings(model)
    if table is not None and largest >= table.weight.shape[0]:
        raise DataError(
            f"the tokenizer gives token {largest}, the model knows {table.weight.shape[0]}; they do not belong together"
        )


def padded(tokenizer: Any, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """What the tokenizer gave for some texts, as one batch; other keys are left out.

    pad_to: the length of the batch in tokens; None for that of the longest text.
    """
    names = [name for name in features[0] if name in tokenizer.model_input_names]
    part = [{name: feature[name] for name in names} for feature in features]
    padding: Any = True if pad_to is None else "max_length"
    return dict(tokenizer.pad(part, padding=padding, max_length=pad_to, return_tensors="pt"))
