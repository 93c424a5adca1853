"""One 4096 x 4096 layer at few tokens, weights beyond the caches: block, bitmask and nm formats against torch float32.

Each side rotates through copies of its weight, so that weights come from memory; random weights and masks. Run pinned:

    taskset -c 0 python benchmarks/kernels_decode.py --threads 1 --out benchmarks/results/DATE-kernels-decode.md
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from kernels_layer import head
from turns import Run, medians_us

from secateur.runtime import isa
from secateur.runtime.choose import candidates
from secateur.runtime.ops import run as called
from secateur.runtime.ops import sparse_linear
from secateur.runtime.packed import GROUPS, VALUES_OF, pack

CACHES_BYTES = 130_000_000
SIZE = 4096


def rotating(weights: list[torch.Tensor], run: Run) -> Run:
    """`run(weight)` on the next of `weights` each time."""
    turn = itertools.cycle(weights)
    return lambda: run(next(turn))


def copies(packed: torch.Tensor) -> list[torch.Tensor]:
    """As many copies as outgrow the caches."""
    return [packed] + [packed.clone() for _ in range(min(24, CACHES_BYTES // packed.numel()))]


def rows_of(tokens: int, density: float, seconds: float) -> list[str]:
    """The table's lines for one number of tokens and one density."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((tokens, SIZE), dtype=np.float32))
    weight = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    dense = [torch.from_numpy(weight.copy()) for _ in range(3)]
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
            runs: dict[str, Run] = {
                "torch": rotating(dense, lambda w: torch.nn.functional.linear(x, w)),
                "secateur": rotating(copies(packed), lambda p: called(sparse_linear, x, p, None, SIZE, 0)),
            }
            pattern = f"{block}x1" if block > 1 else "any"
            lines.append(line(tokens, density, pattern, packing, packed, medians_us(runs, seconds)))
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
    dense = [torch.from_numpy(weight.copy()) for _ in range(3)]
    lines = []
    for keep, of in GROUPS:
        chosen = rng.random((SIZE, SIZE // of, of), dtype=np.float32).argsort(-1) < keep
        kept = weight * chosen.reshape(SIZE, SIZE)
        for value in VALUES_OF["nm"]:
            runs: dict[str, Run] = {"torch": rotating(dense, lambda w: torch.nn.functional.linear(x, w))}
            packings = [{"format": "nm", "value": value, "keep": keep, "of": of}]
            packings += [{"format": "bitmask", "value": value}] * (value in VALUES_OF["bitmask"])
            packed = [torch.from_numpy(pack(kept, **packing)) for packing in packings]
            for packing, blob in zip(packings, packed, strict=True):
                runs[packing["format"]] = rotating(copies(blob), lambda p: called(sparse_linear, x, p, None, SIZE, 0))
            took = medians_us(runs, seconds)
            for packing, blob in zip(packings, packed, strict=True):
                one = {"torch": took["torch"], "secateur": took[packing["format"]]}
                lines.append(line(tokens, keep / of, f"{keep}:{of}", packing, blob, one))
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
