"""One layer with 1 x 4 blocks of zeros in int8, activations rounded at each call, against onnxruntime's dynamic int8.

Both sides, and float32 in torch, onnxruntime and OpenVINO, run in turns in one process; errors are relative to a
float64 product. Run pinned:

    taskset -c 0 python benchmarks/kernels_int8.py --threads 1 --out benchmarks/results/DATE-kernels-int8.md
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from kernels_layer import DENSE, LEAST, grid, head, onnx_runs, options, parsed
from turns import Run, medians_us

from secateur.kernels.native import isa, load_native
from secateur.kernels.packing import pack
from secateur.runtime.layers.operators import sparse_linear
from secateur.runtime.layers.tuning import quad_candidates


def fastest(trials: dict[str, Run]) -> str:
    """The name of the fastest of several packings of one layer, by a short measurement."""
    tuning = medians_us(trials, 0.03 * len(trials), LEAST, 1)
    return min(tuning, key=tuning.__getitem__)


def alone(blob: np.ndarray, x: torch.Tensor, y: torch.Tensor, threads: int) -> Run:
    """The kernel into an output that exists."""
    native, (rows, cols) = load_native(), (y.shape[1], x.shape[1])
    assert native is not None
    address, size = blob.ctypes.data, blob.nbytes
    return lambda: native.linear(address, size, x.data_ptr(), len(x), cols, cols, 0, 0, y.data_ptr(), rows, threads, 0)


def measure(tokens: int, cols: int, rows: int, density: float, threads: int, seconds: float) -> str:
    """One line of the table."""
    rng = np.random.default_rng(0)
    kept = np.repeat(rng.random((rows, cols // 4)) < density, 4, axis=1)
    weight = rng.standard_normal((rows, cols), dtype=np.float32) * kept
    x = torch.from_numpy(rng.standard_normal((tokens, cols), dtype=np.float32))
    dense, exact = torch.from_numpy(weight), x.numpy().astype(np.float64) @ weight.T.astype(np.float64)
    trials: dict[str, Callable[[], torch.Tensor]] = {}
    blobs: dict[str, np.ndarray] = {}
    for tile, chunk in quad_candidates(isa(), tokens):
        blob = blobs[f"{tile}/{chunk}"] = pack(weight, format="quad", value="int8", tile=tile, chunk=chunk)
        trials[f"{tile}/{chunk}"] = partial(sparse_linear, x, torch.from_numpy(blob), None, rows, 0)
    best = fastest(dict(trials))
    runs: dict[str, Run] = {"secateur": trials[best], "torch": lambda: torch.nn.functional.linear(x, dense)}
    runs["alone"] = alone(blobs[best], x, torch.empty(tokens, rows), threads)
    runs |= onnx_runs(weight, x.numpy(), threads)
    took = medians_us(runs, seconds)

    def error(y: np.ndarray) -> str:
        return f"{np.linalg.norm(y - exact) / np.linalg.norm(exact):.2%}"

    ours, theirs = took["secateur"], took["onnxruntime int8"]
    return (
        f"| {tokens} | {cols} -> {rows} | {density:.0%} | {best} | {ours:.0f} | {took['alone']:.0f} | {theirs:.0f} | "
        + " | ".join(f"{took[name]:.0f}" if name in took else "-" for name in DENSE)
        + f" | **{theirs / ours:.2f}** | {min(took[name] for name in DENSE if name in took) / ours:.2f} | "
        f"{error(trials[best]().numpy())} | {error(np.asarray(runs['onnxruntime int8']())[0])} |"
    )


def main() -> None:
    """Run the grid and write the table."""
    args = parsed(options(__doc__, ["384x384", "768x768", "768x3072", "3072x768"], [0.5, 0.2, 0.1], 0.5))
    lines = head(f"One int8 layer, 1 x 4 blocks, {args.threads} thread(s), kernels: {isa()}")
    lines += [
        "Times in microseconds. Errors: against a float64 product of the same weight, norm over norm, normal inputs;",
        "rounding of weights and of activations together, on both sides. 'Without allocation': into an output that",
        "exists; torch allocates one a call, and with these sides in turns its allocator gets it from the system anew.",
        "",
        "| tokens | K -> O | kept | tile/chunk | secateur | without allocation | ORT int8 | torch | onnxruntime "
        "| OpenVINO | times ORT int8 | times float32 | our error | ORT int8 error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for cell in grid(args):
            lines.append(measure(*cell, args.threads, args.seconds))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
