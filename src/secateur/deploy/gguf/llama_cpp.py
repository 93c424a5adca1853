"""llama.cpp in a process of its own, asked over HTTP: tokens of texts, greedy continuations, log probabilities."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.deploy import runner
from secateur.deploy.target import DeployError, translated

GREEDY = {"temperature": 0, "cache_prompt": False, "return_tokens": True}


@dataclass(frozen=True)
class Completion:
    """What llama.cpp wrote.

    tokens: the new ones. text: as llama.cpp decodes them.
    prompt_ms, decode_ms: milliseconds for reading the prompt, and for all new tokens after the first.
    """

    tokens: list[int]
    text: str
    prompt_ms: float
    decode_ms: float


class LlamaCpp:
    """A `.gguf` file that is open on llama.cpp.

    address: of its server, such as http://127.0.0.1:8080.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _ask(self, place: str, **request: Any) -> dict[str, Any]:
        with translated():
            return runner.asked(self._direct, self.address, place, request)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, with those that belong around every text."""
        return list(self._ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation (role, content) by the chat template of the file, up to where an answer begins.

        Raises DeployError for a template that llama.cpp cannot read.
        """
        return self.tokens(self._ask("/apply-template", messages=[dict(message) for message in messages])["prompt"])

    def complete(self, prompt: Sequence[int], count: int, *, ends: bool = False) -> Completion:
        """Continue tokens greedily by at most `count`.

        ends: stop where the text ends.
        """
        answer = self._ask("/completion", **GREEDY, prompt=list(prompt), n_predict=count, ignore_eos=not ends)
        times = answer["timings"]
        return Completion(answer["tokens"], answer["content"], times["prompt_ms"], times["predicted_ms"])

    def log_probabilities(self, prompt: Sequence[int], likeliest: int, whole: int) -> dict[int, float]:
        """Token -> log probability of the likeliest tokens after a prompt, over the whole vocabulary.

        whole: a token that is text by itself. The server tells no probabilities at a step that chooses a part of a
        letter, so this one is chosen, which leaves the probabilities as they are.
        """
        one: dict[str, Any] = {"n_predict": 1, "n_probs": likeliest, "logit_bias": [[whole, 1e6]]}
        answer = self._ask("/completion", **{**GREEDY, "cache_prompt": True}, **one, prompt=list(prompt))
        (step,) = answer["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


@contextlib.contextmanager
def running(path: Path, context: int, threads: int = 1, *, exact: bool = True) -> Iterator[LlamaCpp]:
    """llama.cpp with a file, for texts of at most `context` tokens, in a process that ends with the block.

    exact: attention in float32 rather than, as is usual, in float16.

    Raises DeployError, with llama.cpp's own words, when it cannot open the file or dies of it.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", runner.__file__, "--llama-cpp", str(path)]
    command += ["--threads", str(threads), "--length", str(context)]
    command += ["--exact"] if exact else []
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        ) as process,
    ):
        timer = threading.Timer(runner.START_LIMIT_S, process.kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            answer = json.loads(first) if first else {"error": "its process died"}
            if "error" in answer:
                raise DeployError(f"llama.cpp cannot run {path.name}: {answer['error']}{_words(said)}")
            try:
                yield LlamaCpp(answer["address"])
            except DeployError as error:
                if process.poll() is None:
                    raise
                raise DeployError(f"llama.cpp died of {path.name}{_words(said)}") from error
        finally:
            timer.cancel()
            process.kill()


def _words(file: Any) -> str:
    """What llama.cpp last said of an error, in brackets; '' where it said nothing."""
    file.seek(0)
    errors = [line.strip() for line in file if "error" in line.lower() or "failed" in line.lower()]
    return f" ({runner.printable(errors[0])[:300]})" if errors else ""
