"""Answers of a compiled text model to texts: a label with its probability, or a generated continuation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.torch.data.text_rows import token_ids


@dataclass(frozen=True)
class Answer:
    """The answer to one text.

    text: the text.
    ms: milliseconds that the model took, per text.
    label: the most probable class, of a classifier.
    probability: the probability of that class, of a classifier.
    generated: the continuation, of a model that generates text.
    """

    text: str
    ms: float
    label: str | None = None
    probability: float | None = None
    generated: str | None = None


def generates(model: nn.Module) -> bool:
    """Whether the model continues texts rather than classifying them."""
    can = getattr(model, "can_generate", None)
    return bool(can is not None and can())


def batch_of(model: nn.Module, tokenizer: Any, texts: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """Texts as keyword arguments of the model, padded to one length.

    Raises:
        DataError: for a text that gives no token, or more tokens than the model has positions.
    """
    return dict(tokenizer.pad(token_ids(model, tokenizer, texts, max_length), return_tensors="pt"))


def classify(model: nn.Module, tokenizer: Any, texts: list[str], max_length: int, batch_size: int) -> list[Answer]:
    """The most probable class of each text, in order.

    Raises:
        DataError: for a text that gives no token, or more tokens than the model has positions.
        ModelError: when the model gives no (texts, classes) logits.
    """
    config: Any = model.config
    names = getattr(config, "id2label", None) or {}
    answers = []
    for i in range(0, len(texts), batch_size):
        part = texts[i : i + batch_size]
        batch = batch_of(model, tokenizer, part, max_length)
        start = time.perf_counter()
        with torch.inference_mode():
            logits = getattr(model(**batch), "logits", None)
        ms = (time.perf_counter() - start) * 1e3 / len(part)
        if logits is None or logits.dim() != 2:
            raise ModelError(
                f"{type(model).__name__} neither classifies nor generates; run it from Python with "
                "secateur.runtime.compile"
            )
        best = logits.float().softmax(-1).max(-1)
        answers += [
            Answer(text, ms, names.get(int(c), str(int(c))), float(p))
            for text, p, c in zip(part, best.values, best.indices, strict=True)
        ]
    return answers


def continue_texts(model: Any, tokenizer: Any, texts: list[str], max_length: int, new_tokens: int) -> list[Answer]:
    """The greedy continuation of each text, one text at a time.

    Raises:
        DataError: for a text that gives no token, or, with the new tokens, more than the model has positions.
    """
    answers = []
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    for text in texts:
        encoded = token_ids(model, tokenizer, [text], max_length, 0 if is_encoder_decoder else new_tokens)
        batch = tokenizer.pad(encoded, return_tensors="pt")
        batch.pop("token_type_ids", None)
        length = batch["input_ids"].shape[1]
        start = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(
                **batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        ms = (time.perf_counter() - start) * 1e3
        skip = 0 if is_encoder_decoder else length
        answers.append(Answer(text, ms, generated=tokenizer.decode(ids[0, skip:], skip_special_tokens=True)))
    return answers
