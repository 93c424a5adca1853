"""Compares a GGUF file on llama.cpp with the model in PyTorch: tokens of texts, log probabilities, greedy tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur import agreement
from secateur.deploy.gguf.llama_cpp import Completion, LlamaCpp, running
from secateur.deploy.gguf.vocabulary import SAMPLES
from secateur.deploy.target import DeployError
from secateur.torch.base.batches import evaluating

LIKELIEST = 1024
"""Of how many tokens log probabilities are compared at each step; all share one normaliser, over the vocabulary."""
NEW_TOKENS = 8
"""How many tokens llama.cpp writes after each prompt; PyTorch reads the same ones."""
PROMPTS = ("The", SAMPLES[1])


@dataclass(frozen=True)
class Difference:
    """How far llama.cpp is from PyTorch.

    relative_error: largest of a log probability (`secateur.agreement`). gap: largest absolute difference of one.
    divergence: mean KL divergence from PyTorch's distribution over the tokens compared, in nats.
    agreement: share of steps with the same likeliest token. steps: how many were compared.
    """

    relative_error: float
    gap: float
    divergence: float
    agreement: float
    steps: int


def compare_tokens(llama: LlamaCpp, tokenizer: Any) -> None:
    """DeployError when a text becomes other tokens than with the tokenizer."""
    for text in SAMPLES:
        expected, got = list(tokenizer(text)["input_ids"]), llama.tokens(text)
        if expected != got:
            place = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
            raise DeployError(
                f"llama.cpp splits {text!r} into other tokens ({got[place : place + 3]} where the tokenizer gives "
                f"{expected[place : place + 3]}, from token {place}); its tokenizer cannot be written as GGUF"
            )


def compare(path: Path, model: Any, tokenizer: Any, context: int, threads: int = 1) -> Difference:
    """Run a file and compare it with the model in evaluation mode.

    context: most tokens of the model. Raises DeployError for other tokens of a text, or a file that does not run.
    """
    most = min(context, 256)
    with running(path, most, threads) as llama:
        compare_tokens(llama, tokenizer)
        done = []
        for text in PROMPTS:
            prompt = list(tokenizer(text)["input_ids"])[: max(1, most // 2)]
            count = max(1, min(NEW_TOKENS, most - len(prompt)))
            done.append((prompt, llama.complete(prompt, count, likeliest=min(LIKELIEST, model.config.vocab_size))))
    return difference(model, done)


def difference(model: Any, done: Sequence[tuple[list[int], Completion]]) -> Difference:
    """How far completions of prompts are from what the model says of the same tokens."""
    expected: list[np.ndarray] = []
    got: list[np.ndarray] = []
    same, divergences = [], []
    with evaluating(model), torch.no_grad():
        for prompt, completion in done:
            ids = torch.tensor([[*prompt, *completion.tokens[:-1]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
            ours = torch.log_softmax(logits.double(), -1).numpy()
            for row, step in zip(ours, completion.steps, strict=True):
                tokens = np.fromiter(step, np.int64, len(step))
                theirs = np.fromiter(step.values(), np.float64, len(step))
                mine = row[tokens]
                expected.append(mine)
                got.append(theirs)
                same.append(int(row.argmax()) == int(tokens[theirs.argmax()]))
                divergences.append(float((np.exp(mine) * (mine - theirs)).sum()))
    names = {f"log probabilities of step {i}": values for i, values in enumerate(expected)}
    try:
        found = agreement.compare(names, dict(zip(names, got, strict=True)))
    except agreement.AgreementError as error:
        raise DeployError(f"llama.cpp's log probabilities cannot be compared with PyTorch's: {error}") from error
    return Difference(found.error, found.gap, float(np.mean(divergences)), float(np.mean(same)), len(same))
