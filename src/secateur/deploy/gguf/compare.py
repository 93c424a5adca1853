"""Compares a GGUF file on llama.cpp with the model in PyTorch: tokens of texts, log probabilities, likeliest tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from secateur import agreement
from secateur.deploy.gguf.llama_cpp import LlamaCpp, running
from secateur.deploy.gguf.vocabulary import SAMPLES
from secateur.deploy.target import DeployError
from secateur.torch.base.batches import evaluating

LIKELIEST = 1024
"""Of how many tokens log probabilities are compared at each step; all share one normaliser, over the vocabulary."""
TEXT = SAMPLES[1]
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34)
"""After how many tokens of `TEXT` log probabilities are compared."""
CHAT = (
    {"role": "user", "content": "Hello! What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
)
"""A conversation that goes through the chat template."""


@dataclass(frozen=True)
class Difference:
    """How far llama.cpp is from PyTorch.

    relative_error: largest of a log probability (`secateur.agreement`). gap: largest absolute difference of one.
    divergence: mean KL divergence from PyTorch's distribution, in nats; all other tokens together count as one.
    agreement: share of steps with the same likeliest token. steps: how many were compared.
    chat: a sentence on how the prompt of a conversation differs; '' where it does not, or there is no chat template.
    """

    relative_error: float
    gap: float
    divergence: float
    agreement: float
    steps: int
    chat: str = ""


def compare_tokens(llama: LlamaCpp, tokenizer: Any) -> None:
    """DeployError when a text becomes other tokens than with the tokenizer."""
    for text in SAMPLES:
        expected, got = list(tokenizer(text)["input_ids"]), llama.tokens(text)
        if expected != got:
            pairs = enumerate(zip(expected, got, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(got)))
            raise DeployError(
                f"llama.cpp splits {text!r} into other tokens ({got[place : place + 3]} where the tokenizer gives "
                f"{expected[place : place + 3]}, from token {place}); its tokenizer cannot be written as GGUF"
            )


def compare(path: Path, model: Any, tokenizer: Any, context: int, threads: int = 1) -> Difference:
    """Run a file and compare it with the model in evaluation mode.

    context: most tokens of the model. Raises DeployError for other tokens of a text, or a file that does not run.
    """
    ids = list(tokenizer(TEXT)["input_ids"])[: min(context - 1, max(LENGTHS))]
    with running(path, min(context, 256), threads) as llama:
        compare_tokens(llama, tokenizer)
        chat = chat_difference(llama, tokenizer)
        whole, likeliest = llama.tokens("a")[-1], min(LIKELIEST, model.get_input_embeddings().weight.shape[0])
        lengths = [length for length in LENGTHS if length <= len(ids)]
        got = {length: llama.log_probabilities(ids[:length], likeliest, whole) for length in lengths}
    return replace(difference(model, ids, got), chat=chat)


def chat_difference(llama: LlamaCpp, tokenizer: Any) -> str:
    """How the prompt that llama.cpp makes of a conversation differs from that of transformers, in a sentence; '' where
    it does not, or there is no chat template. Such a file still continues texts, so this is no error."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        text = tokenizer.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True)
        expected, got = list(tokenizer(text, add_special_tokens=False)["input_ids"]), llama.chat_tokens(CHAT)
    except (DeployError, TemplateError) as error:
        return f"the chat template was not tried, as a conversation does not go through it: {error}"
    if expected == got:
        return ""
    return (
        f"llama.cpp makes {len(got)} tokens of a conversation by the chat template, and transformers {len(expected)} "
        "others; give llama.cpp the whole prompt as text instead"
    )


def difference(model: Any, ids: list[int], got: Mapping[int, Mapping[int, float]]) -> Difference:
    """How far log probabilities are from the model's.

    got: length of the text -> token -> log probability of the one that follows.
    """
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    ours = torch.log_softmax(logits.double(), -1).numpy()
    expected: dict[str, np.ndarray] = {}
    found: dict[str, np.ndarray] = {}
    same, divergences = [], []
    for length, step in got.items():
        row, tokens = ours[length - 1], np.fromiter(step, np.int64, len(step))
        name = f"log probabilities after {length} tokens"
        expected[name], found[name] = row[tokens], np.fromiter(step.values(), np.float64, len(step))
        same.append(int(row.argmax()) == max(step, key=lambda token: step[token]))
        divergences.append(divergence(expected[name], found[name]))
    try:
        worst = agreement.compare(expected, found)
    except agreement.AgreementError as error:
        raise DeployError(f"llama.cpp's log probabilities cannot be compared with PyTorch's: {error}") from error
    return Difference(worst.error, worst.gap, float(np.mean(divergences)), float(np.mean(same)), len(same))


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """The KL divergence, in nats, of log probabilities of some tokens, with the others together as one more token; it
    is a lower bound of that over all tokens."""
    shares = np.exp(expected)
    rest, other = (max(1.0 - float(np.exp(values).sum()), 1e-9) for values in (expected, got))
    return max(0.0, float((shares * (expected - got)).sum()) + rest * float(np.log(rest / other)))
