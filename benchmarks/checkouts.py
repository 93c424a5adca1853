"""Two checkouts of secateur side by side in one run: one sparse layer, one encoder and one decoder.

Each checkout runs in a process of its own that loads its own source and kernels; the processes take turns (A B A B
...), each for a fiftieth of a second. Figures are medians of the turns; a ratio is that of the medians. Random weights
of fixed seeds, 80% of them zero. Run pinned, with the interpreter of each checkout's environment:

    taskset -c 0 python benchmarks/checkouts.py BEFORE AFTER --threads 1 --out benchmarks/results/DATE-checkouts.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SECONDS = 0.02
TURNS = 60
DENSITY = 0.2
CASES = {
    "one layer, 1024 x 1024, 128 tokens": "layer",
    "encoder of MiniLM's shape, 1 x 128": "encoder",
    "decoder of 4 layers, width 256, one token after 32": "decoder",
}


def prune(model: Any) -> Any:
    """Zero a fixed random share of every linear weight, in place."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < DENSITY)
    return model.eval()


def build(case: str) -> tuple[Any, Callable[[Any], object]]:
    """A pruned model on the kernels, and one call of it. Formats are those that did best on other machines, not timed
    here, so that both checkouts run the same.
    """
    import torch
    import transformers

    from secateur import runtime

    torch.manual_seed(0)
    if case == "layer":
        x = torch.randn(128, 1024)
        model = runtime.compile(prune(torch.nn.Sequential(torch.nn.Linear(1024, 1024))), measure=False)
        return model, lambda fast: fast(x)
    ids = torch.randint(5, 1000, (1, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case == "encoder":
        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        model = prune(transformers.BertModel(config))
        return runtime.compile(model, measure=False, example=batch), lambda fast: fast(**batch)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = runtime.compile(prune(transformers.LlamaForCausalLM(config)), measure=False, example=batch, tokens=1)
    past = model(input_ids=ids[:, :32], use_cache=True).past_key_values

    def step(fast: Any) -> object:
        output = fast(input_ids=ids[:, 32:33], past_key_values=past, use_cache=True)
        past.crop(-1)
        return output

    return model, step


def serve(threads: int) -> None:
    """Build every case, then time on request: a case in, microseconds a call out, one JSON value a line."""
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        built = {case: build(case) for case in CASES.values()}
        for model, call in built.values():
            call(model)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            model, call = built[json.loads(line)]
            calls, start = 0, time.perf_counter()
            while time.perf_counter() - start < SECONDS:
                call(model)
                calls += 1
            print(json.dumps((time.perf_counter() - start) / calls * 1e6), flush=True)


class Checkout:
    """A process that serves the cases of one checkout."""

    def __init__(self, folder: Path, threads: int) -> None:
        python = folder / ".venv" / "bin" / "python"
        environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [str(python), __file__, "--serve", "--threads", str(threads)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answer()

    def answer(self) -> Any:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def time(self, case: str) -> float:
        """Microseconds of one call, over a turn."""
        assert self.process.stdin is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return float(self.answer())


def commit_of(folder: Path) -> str:
    """The commit of a checkout."""
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Time both checkouts in turns and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.threads)
        return
    sides = [Checkout(folder, options.threads) for folder in (options.before, options.after)]
    lines = [
        "# Two checkouts side by side",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {processor()}, {options.threads} thread(s), {options.turns} turns of "
        f"{SECONDS * 1000:.0f} ms; before: {commit_of(options.before)}, after: {commit_of(options.after)}.",
        "",
        "    " + " ".join(["python benchmarks/checkouts.py", *sys.argv[1:]]),
        "",
        "| | before, us | after, us | after / before | quartiles of the ratio of neighbouring turns |",
        "|---|---|---|---|---|",
    ]
    for title, case in CASES.items():
        times: list[list[float]] = [[], []]
        for _ in range(options.turns):
            for took, side in zip(times, sides, strict=True):
                took.append(side.time(case))
        before, after = (statistics.median(took) for took in times)
        low, _, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
        lines.append(f"| {title} | {before:.1f} | {after:.1f} | {after / before:.3f} | {low:.3f} to {high:.3f} |")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
