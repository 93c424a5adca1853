"""Whole encoders of random weights and random masks: the compiled model against torch, dense, in one process.

MiniLM-shaped (6 x 384) and BERT-base-shaped (12 x 768); medians of alternated runs. Run pinned to as many
cores as threads:

    taskset -c 0 python benchmarks/kernels_model.py --threads 1 --out benchmarks/results/DATE-kernels-model.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from kernels_layer import head
from transformers import BertConfig, BertModel
from turns import medians_us

from secateur import runtime
from secateur.runtime import isa

SHAPES = {
    "MiniLM": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}


def pruned_encoder(shape: str, density: float) -> BertModel:
    """A random encoder with `density` of the weights of its linear layers kept, at random."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPES[shape], vocab_size=1000), add_pooling_layer=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(torch.rand_like(module.weight) < density)
    return model


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--density", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0, help="a line of the table")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = head(
        f"Whole encoders, linear layers with their activations swapped, {args.threads} thread(s), kernels: {isa()}"
    )
    lines += [
        "Random weights and masks. Dense is torch eager with its default attention (SDPA).",
        "",
        "| model | batch x length | kept | torch ms | secateur ms | ratio | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in args.shapes:
        for density in args.density:
            model = pruned_encoder(shape, density)
            for batch in args.batches:
                ids = torch.randint(0, 1000, (batch, args.length))
                fast = runtime.compile(model, tokens=batch * args.length, example={"input_ids": ids})
                with torch.inference_mode():
                    difference = (fast(ids)[0] - model(ids)[0]).abs().max().item()
                    runs = {"dense": lambda m=model, i=ids: m(i), "fast": lambda m=fast, i=ids: m(i)}
                    took = medians_us(runs, args.seconds)
                lines.append(
                    f"| {shape} | {batch} x {args.length} | {density:.0%} | {took['dense'] / 1000:.2f} | "
                    f"{took['fast'] / 1000:.2f} | **{took['dense'] / took['fast']:.2f}** | {difference:.1e} |"
                )
                print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
