"""One sparse layer on the kernels against the fastest of torch, onnxruntime and OpenVINO, all in one process.

Each other side is run in turn with secateur, A B A B ...; figures are medians of the times, a ratio is one of medians
of the same turns. Once more all sides go in turn, each of which then finds its data and code out of the caches that the
others have filled; the ratio of these turns stands beside. Turns in which the machine was disturbed do not count (see
turns.py). Run pinned:

    taskset -c 0 python benchmarks/kernels_layer.py --threads 1 --out benchmarks/results/DATE-kernels-layer.md

onnxruntime's dynamic int8 is shown beside, where onnxruntime is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from turns import Run, medians_us, samples_us

from secateur.runtime.choose import candidates, machine_key
from secateur.runtime.native import isa
from secateur.runtime.ops import sparse_linear
from secateur.runtime.packed import pack, row_block_for

LEAST = 5
"""Samples of each side of a pair."""
DENSE = ("torch", "onnxruntime", "OpenVINO")


def fastest(trials: dict[str, Run]) -> str:
    """The name of the fastest of several packings of one layer, by a short measurement."""
    tuning = medians_us(trials, 0.03 * len(trials), LEAST, 1)
    return min(tuning, key=tuning.__getitem__)


def onnx_runs(weight: np.ndarray, x: np.ndarray, threads: int) -> dict[str, Run]:
    """float32 and dynamic int8 in onnxruntime and float32 in OpenVINO, as far as they are installed."""
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    helper, float_type = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", float_type, x.shape)],
        [helper.make_tensor_value_info("y", float_type, [x.shape[0], weight.shape[0]])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, path8 = f"{folder}/f32.onnx", f"{folder}/i8.onnx"
        onnx.save(model, path)
        quantize_dynamic(path, path8, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for name, file in (("onnxruntime", path), ("onnxruntime int8", path8)):
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            runs[name] = lambda s=session: s.run(None, {"x": x})
        try:
            import openvino
        except ImportError:
            return runs
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    runs["OpenVINO"] = request.infer
    return runs


def measure(tokens: int, cols: int, rows: int, density: float, threads: int, seconds: float) -> dict:
    """One line of the table."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, cols), dtype=np.float32) * (rng.random((rows, cols)) < density)
    x = torch.from_numpy(rng.standard_normal((tokens, cols), dtype=np.float32))
    dense = torch.from_numpy(weight)
    trials = {}
    for tile, chunk in candidates(isa(), tokens):
        row_block = row_block_for(rows, tile, tokens, threads)
        packed = torch.from_numpy(pack(weight, tile=tile, chunk=chunk, row_block=row_block))
        trials[f"{tile}/{chunk}"] = lambda p=packed: sparse_linear(x, p, None, rows, 0)
    best = fastest(trials)
    ours = {"secateur": trials[best]}
    others: dict[str, Run] = {"torch": lambda: torch.nn.functional.linear(x, dense)}
    others |= onnx_runs(weight, x.numpy(), threads)
    assert torch.allclose(trials[best](), torch.nn.functional.linear(x, dense), atol=1e-3)
    samples = {name: samples_us(ours | {name: run}, seconds / 5, LEAST, 1) for name, run in others.items()}
    together = medians_us(ours | others, seconds / 5, LEAST, 1)
    pairs = {name: {side: float(np.median(t)) for side, t in pair.items()} for name, pair in samples.items()}
    ratios = {name: pair[name] / pair["secateur"] for name, pair in pairs.items()}
    tenths = {n: np.percentile(pair[n], 10) / np.percentile(pair["secateur"], 10) for n, pair in samples.items()}
    hardest = min((name for name in DENSE if name in ratios), key=ratios.__getitem__)
    return {
        "packing": best,
        "secateur": pairs[hardest]["secateur"],
        "others": {name: pair[name] for name, pair in pairs.items()},
        "ratio": ratios[hardest],
        "ratio of tenths": min(tenths[name] for name in DENSE if name in tenths),
        "int8 ratio": ratios.get("onnxruntime int8"),
        "ratio of all": min(together[name] for name in DENSE if name in together) / together["secateur"],
    }


def version(name: str) -> str:
    """The installed version, or a dash."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def head(title: str) -> list[str]:
    """Title, command, machine and versions of a result file."""
    names = ("torch", "onnxruntime", "openvino", "numpy", "transformers")
    forced = {
        k: os.environ[k] for k in ("SECATEUR_ISA", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA") if k in os.environ
    }
    return [
        f"# {title}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC. `{' '.join(['python', *sys.argv])}` {forced or ''}",
        "",
        f"{machine_key()}; {platform.python_implementation()} {platform.python_version()}; "
        + ", ".join(f"{n} {version(n)}" for n in names),
        "",
    ]


def options(description: str | None, shapes: list[str], density: list[float], seconds: float) -> argparse.Namespace:
    """What the command line says of a table over tokens, shapes and densities; torch gets its threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=shapes, help="inputs x outputs")
    parser.add_argument("--density", type=float, nargs="+", default=density)
    parser.add_argument("--seconds", type=float, default=seconds, help="a line of the table")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def grid(args: argparse.Namespace) -> Iterator[tuple[int, int, int, float]]:
    """Tokens, inputs, outputs and density of each line."""
    for tokens, shape, density in itertools.product(args.tokens, args.shapes, args.density):
        cols, rows = map(int, shape.split("x"))
        yield tokens, cols, rows, density


def main() -> None:
    """Run the grid and write the table."""
    args = options(__doc__, ["768x768", "768x3072", "3072x768"], [0.5, 0.3, 0.2, 0.1, 0.05], 0.8)
    lines = head(f"One float32 layer, unstructured zeros, {args.threads} thread(s), kernels: {isa()}")
    lines += [
        "Times in microseconds, medians; GF/s of useful work. Ratio: the fastest dense float32 side over secateur, "
        "each in turn with secateur; tenth: the same of the best tenths of both sides' times, for machines that others "
        "share; all: where all sides go in turn.",
        "",
        "| tokens | K -> O | kept | tile/chunk | secateur | GF/s | torch | onnxruntime | OpenVINO | ratio | tenth "
        "| all | ORT int8 | int8 ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for tokens, cols, rows, density in grid(args):
            r = measure(tokens, cols, rows, density, args.threads, args.seconds)
            cell = {n: f"{r['others'][n]:.0f}" if n in r["others"] else "-" for n in (*DENSE, "onnxruntime int8")}
            useful = 2e-3 * tokens * cols * rows * density / r["secateur"]
            int8 = f"{r['int8 ratio']:.2f}" if r["int8 ratio"] else "-"
            lines.append(
                f"| {tokens} | {cols} -> {rows} | {density:.0%} | {r['packing']} | {r['secateur']:.0f} "
                f"| {useful:.1f} | {cell['torch']} | {cell['onnxruntime']} | {cell['OpenVINO']} "
                f"| **{r['ratio']:.2f}** | {r['ratio of tenths']:.2f} | {r['ratio of all']:.2f} "
                f"| {cell['onnxruntime int8']} | {int8} |"
            )
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
