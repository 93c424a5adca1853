"""Decoding of a language model pruned in blocks of 8 x 1: tokens per second on the kernels against torch, with the
perplexity of what was decoded beside it. In one process, in turns. Run pinned to as many cores as threads:

    taskset -c 0 python benchmarks/kernels_llm.py DENSE PRUNED... --text TEXT --threads 1 --out benchmarks/results/...

DENSE and PRUNED are model folders (`secateur prune DENSE --pattern 8x1 --sparsity 0.5 --calibration ...`); TEXT is a
text file that no calibration has seen.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_layer import head

from secateur import runtime
from secateur.torch.open import load_model
from secateur.torch.text import load_tokenizer

NEW_TOKENS = 24
CONTEXT, WINDOWS = 256, 8


def windows(folder: Path, text: Path) -> torch.Tensor:
    """(windows, context) token ids of the text."""
    ids = load_tokenizer(folder)(text.read_text()[:60000], return_tensors="pt")["input_ids"][0]
    return ids[: CONTEXT * WINDOWS].reshape(WINDOWS, CONTEXT)


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Of the windows, each on its own."""
    losses = []
    with torch.inference_mode():
        for row in tokens:
            logits = model(row[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    return math.exp(float(np.mean(losses)))


def tokens_per_second(models: dict[str, Any], prompt: torch.Tensor, turns: int) -> dict[str, float]:
    """Greedy decoding after a prompt, the prompt's own time taken off; medians of turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            took = []
            for count in (1, 1 + NEW_TOKENS):
                start = time.perf_counter()
                with torch.inference_mode():
                    model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
                took.append(time.perf_counter() - start)
            if turn:
                seconds[name].append(took[1] - took[0])
    return {name: NEW_TOKENS / float(np.median(s)) for name, s in seconds.items()}


def main() -> None:
    """Decode, score and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--values", nargs="+", default=["float32", "float16", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = windows(args.dense, args.text)
    models: dict[str, Any] = {"dense, torch": load_model(args.dense, dtype=torch.float32).eval()}
    sizes = {}
    for folder in args.pruned:
        model = load_model(folder, dtype=torch.float32).eval()
        for value in args.values:
            fast = runtime.compile(model, tokens=1, value=value, measure=False)
            packed = [layer for layer in fast.secateur_report.layers if layer.format != "dense"]
            share = sum(layer.packed_bytes for layer in packed) / sum(layer.dense_bytes for layer in packed)
            models[f"{folder.name}, {value}"] = fast
            sizes[f"{folder.name}, {value}"] = f"{len(packed)} layers, {share:.2f}"
    speed = tokens_per_second(models, tokens[:1, :16], args.turns)
    lines = head(f"Decoding one token at a time, blocks of 8 x 1, {args.threads} thread(s), kernels: {runtime.isa()}")
    lines += ["| model | tokens per second | times dense torch | perplexity | packed, of the dense bytes |"]
    lines += ["|---|---|---|---|---|"]
    for name, model in models.items():
        lines.append(
            f"| {name} | {speed[name]:.1f} | **{speed[name] / speed['dense, torch']:.2f}** | "
            f"{perplexity(model, tokens):.1f} | {sizes.get(name, '-')} |"
        )
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
