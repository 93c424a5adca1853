"""Peak memory of pruning a model of 1.5 billion parameters block by block.

Writes a random Llama-shaped checkpoint in bfloat16 (about 3 GB), prunes it in a process of its own, and reads the peak
resident set of that process (VmHWM). Files are deleted afterwards. Run:

    OMP_NUM_THREADS=1 python benchmarks/llm_memory.py [--criterion wanda] [--samples 2] [--context 256]
"""

import argparse
import json
import os
import platform
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


def write_checkpoint(folder: Path) -> int:
    """A random checkpoint, one shard a layer; returns its number of parameters."""
    from transformers import LlamaConfig

    from secateur.files import write_json
    from secateur.torch.files.safetensors_shards import write_shard

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
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
    for layer in range(LAYERS + 1):
        file = f"model-{layer + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        if layer < LAYERS:
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


def prune(place: Path, criterion: str, samples: int, context: int) -> dict[str, Any]:
    """Prune in this process; memory, seconds and sparsity."""
    from secateur.recipe import make_recipe
    from secateur.torch.stream.run import prune_folder

    torch.set_num_threads(1)
    windows = torch.randint(VOCABULARY, (samples, context), generator=torch.Generator().manual_seed(0))
    recipe = make_recipe(criterion=criterion, pattern="2:4", samples=samples, context=context, memory="3GB")
    choices: list[Any] = []
    start = time.perf_counter()
    report = prune_folder(
        place / "dense",
        place / "out",
        windows,
        recipe,
        lambda done: print(done.path, f"{done.seconds:.1f} s", file=sys.stderr, flush=True),
        began=lambda choice, resumed: choices.append(choice),
    )
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    expected, on_disk = choices[0].expected, choices[0].on_disk
    seconds = time.perf_counter() - start
    sparsity = report.zeros / report.weights
    return {"peak": peak, "expected": expected, "on_disk": on_disk, "seconds": seconds, "sparsity": sparsity}


def main() -> None:
    """Write, prune, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--place", type=Path, help="folder for the files; default: a temporary one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(prune(args.place, args.criterion, args.samples, args.context)))
        return
    work = Path(tempfile.mkdtemp(dir=args.place))
    try:
        parameters = write_checkpoint(work / "dense")
        options = ["--criterion", args.criterion, "--samples", str(args.samples), "--context", str(args.context)]
        command = [sys.executable, __file__, "--one", "--place", str(work), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        size = sum(p.stat().st_size for p in (work / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(work)
    lines = [
        "# Peak memory of pruning 1.5 billion parameters block by block",
        "",
        f"Command: `python benchmarks/llm_memory.py {' '.join(options)}`. Random Llama-shaped checkpoint, {LAYERS} "
        f"layers, hidden {HIDDEN}, {parameters:,} parameters in bfloat16, computed in float32; 2:4, `memory=3GB`.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, {datetime.now(UTC):%Y-%m-%d}; the machine was "
        "shared, so the seconds say little.",
        "",
        "| method | windows x tokens | peak RSS MB | estimated MB | on disk | sparsity | s | written MB |",
        "|---|---|---|---|---|---|---|---|",
        f"| {args.criterion} | {args.samples} x {args.context} | {facts['peak'] / 1e6:.0f} "
        f"| {facts['expected'] / 1e6:.0f} "
        f"| {facts['on_disk']} | {facts['sparsity']:.4f} | {facts['seconds']:.0f} | {size / 1e6:.0f} |",
        "",
    ]
    out = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-llm-memory.md"
    out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
