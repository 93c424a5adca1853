"""Text that an exported GGUF file goes on with, on llama.cpp, and how fast: several artefacts in turn."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.deploy import target
from secateur.deploy.gguf.llama_cpp import Completion, LlamaCpp, running
from secateur.deploy.target import GGUF, DeployError


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians over the turns: while it reads a prompt, and while it writes, one token after the
    other. bytes: size of the file."""

    prompt: float
    decode: float
    bytes: int


def is_gguf(folder: Path | str) -> bool:
    """Whether a folder is an artefact for llama.cpp."""
    if not (Path(folder) / target.runner.MANIFEST).is_file():
        return False
    return bool(target.read(folder)["target"] == GGUF)


def file_of(folder: Path | str) -> tuple[Path, int, int]:
    """The file of an artefact, the most tokens that it takes, and the size of its vocabulary.

    Raises DeployError for what is no GGUF artefact.
    """
    info: dict[str, Any] = target.read(folder)
    if info["target"] != GGUF:
        raise DeployError(f"{folder} is for {info['target']}; llama.cpp runs what was exported --to gguf")
    graph = info["graphs"]["model"]
    port = graph["inputs"][0]
    return Path(folder) / graph["files"][0], port["at_most"]["1"] + 1, port["high"]


def generate_text(
    folder: Path | str, texts: Sequence[str], max_new_tokens: int = 32, *, threads: int = 1
) -> list[Completion]:
    """How a GGUF artefact goes on with each text, greedily, until the text ends.

    Raises DeployError for a text that, with the new tokens, is longer than the model's context.
    """
    file, context, _ = file_of(folder)
    # A letter is at least one byte, and no token is shorter.
    longest = max((len(text.encode()) for text in texts), default=0) + max_new_tokens + 2
    with running(file, min(context, rounded(longest)), threads, exact=False) as llama:
        return [_completed(llama, text, max_new_tokens, context) for text in texts]


def _completed(llama: LlamaCpp, text: str, count: int, context: int) -> Completion:
    tokens = llama.tokens(text)
    if not tokens or len(tokens) + count > context:
        raise DeployError(
            f"a text of {len(tokens)} tokens and {count} new ones do not fit the model, which takes from 1 to {context}"
        )
    return llama.complete(tokens, count, ends=True)


def rounded(tokens: int) -> int:
    """The next multiple of 256, in which llama.cpp reserves memory for keys and values."""
    return -(-tokens // 256) * 256


def speeds(
    folders: Mapping[str, Path | str], prompt: int = 64, new_tokens: int = 32, *, threads: int = 1, turns: int = 5
) -> dict[str, Speed]:
    """Time GGUF artefacts in turn (A B A B ...) on made-up prompts, each in a process of its own.

    prompt: tokens that are read. new_tokens: how many are written after that, at least 2.
    """
    if prompt < 1 or new_tokens < 2 or turns < 1:
        raise DeployError(f"a prompt of {prompt} tokens, {new_tokens} new ones in {turns} turns cannot be timed")
    found: dict[str, list[Completion]] = {name: [] for name in folders}
    with contextlib.ExitStack() as stack:
        held = {}
        for name, folder in folders.items():
            file, context, high = file_of(folder)
            if prompt + new_tokens > context:
                raise DeployError(f"{folder} takes {context} tokens, fewer than {prompt} and {new_tokens} new ones")
            llama = stack.enter_context(running(file, rounded(prompt + new_tokens), threads, exact=False))
            held[name] = llama, np.random.default_rng(0).integers(0, high, prompt).tolist()
            llama.complete(held[name][1], 2)
        for _ in range(turns):
            for name, (llama, tokens) in held.items():
                found[name].append(llama.complete(tokens, new_tokens))
    return {
        name: Speed(
            statistics.median(1e3 * prompt / one.prompt_ms for one in done),
            statistics.median(1e3 * (new_tokens - 1) / one.decode_ms for one in done),
            file_of(folders[name])[0].stat().st_size,
        )
        for name, done in found.items()
    }
