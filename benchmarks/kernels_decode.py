"""One 4096 x 4096 layer at few tokens, weights beyond the caches: block, bitmask and nm formats against torch float32.

Each side rotates through copies of its weight, so that weights come from memory, for a fiftieth of a second a turn: a
single call after another library's 67 MB is slower than the calls that follow, and no model meets that at every layer.
Random weights and masks. Run pinned:

    taskset -c 0 python benchmarks/kernels_decode.py --threads 1 --out benchmarks/results/DATE-kernels-decode.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from kernels_layer import head, turn
from turns import medians_us

from secateur.kernels.format import GROUPS, VALUES_OF
from secateur.kernels.packing import pack
from secateur.runtime import isa
from secateur.runtime.layers.operators import run as called
from secateur.runtime.layers.operators import sparse_linear
from secateur.runtime.layers.tuning import candidates

CACHES_BYTES = 130_000_000
SIZE = 4096


Layer = Callable[[torch.Tensor], torch.Tensor]


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """As many copies as outgrow the caches."""
    return [weight] + [weight.clone() for _ in range(CACHES_BYTES // (weight.numel() * weight.element_size()))]


def medians(sides: dict[str, tuple[Layer, torch.Tensor]], seconds: float) -> dict[str, float]:
    """Microseconds a call of each side's layer on copies of its weight, turn by turn."""
    turns = {name: turn([partial(layer, w) for w in copies(weight)]) for name, (layer, weight) in sides.items()}
    took = medians_us({name: run for name, (run, _) in turns.items()}, seconds)
    return {name: took[name] / calls for name, (_, calls) in turns.items()}


def layers_of(x: torch.Tensor) -> tuple[Layer, Layer]:
    """The dense and the sparse layer on one input; the sparse one is called as a compiled layer is."""
    return partial(torch.nn.functional.linear, x), lambda packed: called(sparse_linear, x, packed, None, SIZE, 0)


def rows_of(tokens: int, density: float, seconds: float) -> list[str]:
    """The table's lines for one number of tokens and one density."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((tokens, SIZE), dtype=np.float32))
    weight = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    dense, sparse = layers_of(x)
    lines = []
    for block in (8, 4, 1):
        kept = weight * np.repeat(rng.random((SIZE // block, SIZE)) < density, block, axis=0)
        format = "block" if block > 1 else "bitmask"
        packings = [{"format": format, "value": value, "block": max(block, 4)} for value in VALUES_OF[format]]
        if block == 1:
            tile, chunk = candidates(isa(), tokens)[-1]
            packings.append({"format": "tiled", "value": "float32", "tile": tile, "chunk": chunk})
        for packing in packings:
            packed = torch.from_numpy(pack(kept, **packing))
            sides = {"torch": (dense, torch.from_numpy(weight)), "secateur": (sparse, packed)}
            pattern = f"{block}x1" if block > 1 else "any"
            lines.append(line(tokens, density, pattern, packing, packed, medians(sides, seconds)))
    return lines


def line(tokens: int, density: float, pattern: str, packing: dict, packed: torch.Tensor, took: dict[str, float]) -> str:
    """One line of the table, printed too."""
    text = (
        f"| {tokens} | {density:.0%} | {pattern} | {packing['format']} | {packing['value']} | "
        f"{packed.numel() / 1e6:.1f} | {took['torch']:.0f} | {took['secateur']:.0f} | "
        f"{packed.numel() / took['secateur'] / 1e3:.1f} | **{took['torch'] / took['secateur']:.2f}** |"
    )
    print(text, flush=True)
    return text


def group_rows(tokens: int, seconds: float) -> list[str]:
    """The table's lines of N:M for one number of tokens: in the nm format, and in bitmask beside it."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((tokens, SIZE), dtype=np.float32))
    weight = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    dense, sparse = layers_of(x)
    lines = []
    for keep, of in GROUPS:
        chosen = rng.random((SIZE, SIZE // of, of), dtype=np.float32).argsort(-1) < keep
        kept = weight * chosen.reshape(SIZE, SIZE)
        for value in VALUES_OF["nm"]:
            sides = {"torch": (dense, torch.from_numpy(weight))}
            packings = [{"format": "nm", "value": value, "keep": keep, "of": of}]
            packings += [{"format": "bitmask", "value": value}] * (value in VALUES_OF["bitmask"])
            packed = [torch.from_numpy(pack(kept, **packing)) for packing in packings]
            for packing, blob in zip(packings, packed, strict=True):
                sides[packing["format"]] = (sparse, blob)
            took = medians(sides, seconds)
            for packing, blob in zip(packings, packed, strict=True):
                pair = {"torch": took["torch"], "secateur": took[packing["format"]]}
                lines.append(line(tokens, keep / of, f"{keep}:{of}", packing, blob, pair))
    return lines


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.2, 0.1])
    parser.add_argument("--groups", action="store_true", help="N:M only")
    parser.add_argument("--seconds", type=float, default=0.5, help="a line of the table")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = head(f"One 4096 x 4096 layer at few tokens, {args.threads} thread(s), kernels: {isa()}")
    lines += [
        "Weights come from memory, not from a cache. Times in microseconds.",
        "",
        "| tokens | kept | pattern | format | stored as | MB | torch float32 | secateur | GB/s | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for tokens in args.tokens:
            if args.groups:
                lines += group_rows(tokens, args.seconds)
                continue
            for density in args.density:
                lines += rows_of(tokens, density, args.seconds)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
