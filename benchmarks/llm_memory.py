"""Peak memory of pruning a model of 1.5 billion parameters block by block.

Writes a random Llama-shaped checkpoint in bfloat16 (about 3 GB), prunes it in a process of its own, and reads the peak
resident set of that process (VmHWM). Files are deleted afterwards. Run:

    python benchmarks/llm_memory.py [--criterion wanda] [--samples 2] [--context 256]
    python benchmarks/llm_memory.py --target "params<=0.75" [--threads 2] [--samples 2] [--context 256]

The first line prunes single weights 2:4, the second whole units. `--layers` writes a checkpoint of fewer blocks, which
takes less time and the same memory but for what is kept for each block.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402

LAYERS, HIDDEN, INNER, HEADS, KV, VOCABULARY = 32, 2048, 5632, 16, 4, 32000


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random checkpoint, one shard a layer; returns its number of parameters."""
    from transformers import LlamaConfig

    from secateur.files import write_json
    from secateur.torch.files.safetensors_shards import write_shard

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    narrow = HIDDEN // HEADS * KV
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}
    count = 0
    for layer in range(layers + 1):
        file = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        if layer < layers:
            at = f"model.layers.{layer}"
            parts = {f"{at}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                parts[f"{at}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        else:
            parts = {name: draw(VOCABULARY, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            parts["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        write_shard(folder / file, parts, folder.parent)
        index |= dict.fromkeys(parts, file)
        count += sum(part.numel() for part in parts.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * count}, "weight_map": index})
    return count


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process; memory, seconds and what was reached."""
    torch.set_num_threads(args.threads)
    windows = torch.randint(VOCABULARY, (args.samples, args.context), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    facts = weights(args, windows) if args.target is None else units(args, windows)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    return {**facts, "peak": peak, "seconds": time.perf_counter() - start}


def weights(args: argparse.Namespace, windows: torch.Tensor) -> dict[str, Any]:
    """Prune single weights 2:4."""
    from secateur.recipe import make_recipe
    from secateur.torch.stream.run import prune_folder

    recipe = make_recipe(
        criterion=args.criterion, pattern="2:4", samples=args.samples, context=args.context, memory="3GB"
    )
    choices: list[Any] = []
    report = prune_folder(
        args.place / "dense",
        args.place / "out",
        windows,
        recipe,
        lambda done: print(done.path, f"{done.seconds:.1f} s", file=sys.stderr, flush=True),
        began=lambda choice, resumed: choices.append(choice),
    )
    expected, on_disk = choices[0].expected, choices[0].on_disk
    return {
        "method": args.criterion,
        "expected": expected,
        "on_disk": on_disk,
        "reached": f"sparsity {report.zeros / report.weights:.4f}",
    }


def units(args: argparse.Namespace, windows: torch.Tensor) -> dict[str, Any]:
    """Prune whole units for a target."""
    from secateur.search.streamed.run import prune_units
    from secateur.search.target import make_target

    began, plans = time.perf_counter(), []

    def show(walk: str, step: int, steps: int) -> None:
        print(walk, step, steps, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    report = prune_units(
        args.place / "dense",
        args.place / "out",
        windows,
        make_target(limits=[args.target], round=32),
        memory=3 * 10**9,
        began=lambda plan, resumed: plans.append(plan),
        progress=show,
    )
    (asked,) = report.asked
    return {
        "method": f"units, {args.target}, neurons in multiples of 32",
        "expected": plans[0].expected,
        "on_disk": f"{plans[0].disk / 1e6:.0f} MB",
        "reached": f"{asked.what} {asked.reached}",
    }


def main() -> None:
    """Write, prune, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--target", help="prune whole units for this target, such as params<=0.75")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--place", type=Path, help="folder for the files; default: a temporary one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(prune(args)))
        return
    work = Path(tempfile.mkdtemp(dir=args.place))
    try:
        parameters = write_checkpoint(work / "dense", args.layers)
        options = ["--criterion", args.criterion] if args.target is None else ["--target", args.target]
        for name in ("samples", "context", "layers", "threads"):
            options += [f"--{name}", str(getattr(args, name))]
        command = [sys.executable, __file__, "--one", "--place", str(work), *options]
        threads = str(args.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        size = sum(p.stat().st_size for p in (work / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    what = "single weights 2:4" if args.target is None else "whole units"
    lines = [
        f"# Peak memory of pruning {parameters / 1e9:.1f} billion parameters block by block: {what}",
        "",
        f"Command: `python benchmarks/llm_memory.py {shlex.join(options)}`. Random Llama-shaped checkpoint, "
        f"{args.layers} layers, hidden {HIDDEN}, {INNER} neurons, {parameters:,} parameters in bfloat16, computed in "
        "float32; `memory=3GB`.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, threads: {threads}, {datetime.now(UTC):%Y-%m-%d}; the "
        "machine was shared, so the seconds say little.",
        "",
        "| method | windows x tokens | peak RSS MB | estimated MB | states on disk | reached | s | written MB |",
        "|---|---|---|---|---|---|---|---|",
        f"| {facts['method']} | {args.samples} x {args.context} | {facts['peak'] / 1e6:.0f} "
        f"| {facts['expected'] / 1e6:.0f} "
        f"| {facts['on_disk']} | {facts['reached']} | {facts['seconds']:.0f} | {size / 1e6:.0f} |",
        "",
    ]
    name = "llm-memory" if args.target is None else "llm-memory-units"
    out = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{name}.md"
    out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
