"""One sparse layer on the kernels against the fastest of torch, onnxruntime and OpenVINO, all in one process.

Sides take turns, A B A B ... A turn calls several layers of one shape one after the other, as a model does, again and
again for a fiftieth of a second: a single layer would keep its weights in the cache, and the first calls after those of
another library are slower than the calls that follow, which no model meets at every layer. Figures are medians of the
turns' times a layer, ratios are of medians of the same turns. Turns in which the machine was disturbed do not count
(see turns.py). secateur chooses the format of each layer by its own measurement. Run pinned:

    taskset -c 0 python benchmarks/kernels_layer.py --threads 1 --out benchmarks/results/DATE-kernels-layer.md

With --model FOLDER the layers are those of a pruned model (of its model.safetensors), with its zeros, instead of random
layers. Where onnxruntime is installed, its dynamic int8 is measured too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from turns import Run, samples_us

from secateur.kernels.native import isa
from secateur.kernels.packing import pack
from secateur.runtime.layers.operators import run as called
from secateur.runtime.layers.operators import sparse_linear
from secateur.runtime.layers.tuning import FEW_TOKENS, choose, machine_key

LEAST = 5
"""Samples of each side of a pair."""
TURN_SECONDS = 0.02
CACHES_BYTES = 64_000_000
"""At few tokens as many layers are called as outgrow this, at most 24."""
MOST_LAYERS, MOST_LAYERS_FEW = 4, 24
LARGE = 2e9
"""Products in a layer from which on it is called alone."""
DENSE = ("torch", "onnxruntime", "OpenVINO")
INT8 = "onnxruntime int8"


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
        for name, file in (("onnxruntime", path), (INT8, path8)):
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


class Layers(NamedTuple):
    """Layers of one shape, (rows, cols) each."""

    weights: list[np.ndarray]
    density: float


@dataclass
class Took:
    """Of `layers` layers in `packing`: microseconds a layer and ratios, by the name of the other side."""

    layers: int
    packing: str
    ours: dict[str, float] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    tenth: dict[str, float] = field(default_factory=dict)


def how_many(tokens: int, cols: int, rows: int) -> int:
    """Layers that a turn calls."""
    if tokens <= FEW_TOKENS:
        return min(MOST_LAYERS_FEW, max(MOST_LAYERS, CACHES_BYTES // (4 * cols * rows)))
    return MOST_LAYERS if cols * rows * tokens < LARGE else 1


def random_layers(cols: int, rows: int, density: float, count: int, block: int = 1) -> Layers:
    """Layers with zeros anywhere, or in blocks of so many rows of a column."""
    rng = np.random.default_rng(0)

    def one() -> np.ndarray:
        kept = np.repeat(rng.random((rows // block, cols)) < density, block, axis=0)
        return rng.standard_normal((rows, cols), dtype=np.float32) * kept

    return Layers([one() for _ in range(count)], density)


def layers_of(model: Path) -> list[Layers]:
    """The pruned linear layers of a model, by shape."""
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    with safe_open(model / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            weight = file.get_tensor(name)
            if weight.ndim == 2 and np.count_nonzero(weight) < 0.95 * weight.size:
                by_shape.setdefault(weight.shape, []).append(weight.astype(np.float32))
    return [
        Layers(same, sum(np.count_nonzero(w) for w in same) / sum(w.size for w in same)) for same in by_shape.values()
    ]


def turn(layers: list[Run]) -> tuple[Run, int]:
    """All layers, again and again for about TURN_SECONDS; and how many calls that is."""
    for run in layers:
        run()
    start = time.perf_counter()
    for run in layers:
        run()
    rounds = max(1, round(TURN_SECONDS / (time.perf_counter() - start)))

    def run_all() -> None:
        for _ in range(rounds):
            for run in layers:
                run()

    return run_all, rounds * len(layers)


def measure(tokens: int, layers: Layers, threads: int, seconds: float) -> Took:
    """One line of the table."""
    rows, cols = layers.weights[0].shape
    weights = layers.weights[: how_many(tokens, cols, rows)]
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((tokens, cols), dtype=np.float32))
    choice = choose(weights[0], None, tokens=tokens, use_cache=False)
    others: dict[str, list[Run]] = {
        "torch": [partial(torch.nn.functional.linear, x, torch.from_numpy(weight)) for weight in weights]
    }
    for weight in weights:
        for name, run in onnx_runs(weight, x.numpy(), threads).items():
            others.setdefault(name, []).append(run)
    ours, packing = others["torch"], "dense"
    if choice.packing:
        packing = "/".join(str(choice.packing[k]) for k in ("format", "tile", "chunk") if k in choice.packing)
        packed = [torch.from_numpy(pack(weight, **choice.packing)) for weight in weights]
        ours = [partial(called, sparse_linear, x, blob, None, rows, 0) for blob in packed]  # as a compiled layer does
        assert torch.allclose(
            sparse_linear(x, packed[-1], None, rows, 0), x @ torch.from_numpy(weights[-1]).T, atol=1e-3
        )
    found = Took(len(weights), packing)
    own_turn, own_calls = turn(ours)
    for name, runs in others.items():
        other_turn, other_calls = turn(runs)
        took = samples_us({"other": other_turn, "ours": own_turn}, seconds / len(others), LEAST, 1)
        other, own = took["other"] / other_calls, took["ours"] / own_calls
        found.other[name], found.ours[name] = float(np.median(other)), float(np.median(own))
        found.ratio[name] = found.other[name] / found.ours[name]
        found.tenth[name] = float(np.percentile(other, 10) / np.percentile(own, 10))
    return found


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


def options(
    description: str | None, shapes: list[str], density: list[float], seconds: float
) -> argparse.ArgumentParser:
    """The command line of a table over tokens, shapes and densities."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--shapes", nargs="+", default=shapes, help="inputs x outputs")
    parser.add_argument("--density", type=float, nargs="+", default=density)
    parser.add_argument("--seconds", type=float, default=seconds, help="a line of the table")
    parser.add_argument("--out", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What it says; torch gets its threads."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def grid(args: argparse.Namespace) -> Iterator[tuple[int, int, int, float]]:
    """Tokens, inputs, outputs and density of each line."""
    for tokens, shape, density in itertools.product(args.tokens, args.shapes, args.density):
        cols, rows = map(int, shape.split("x"))
        yield tokens, cols, rows, density


def line(tokens: int, layers: Layers, took: Took) -> str:
    """One line of the table."""
    rows, cols = layers.weights[0].shape
    dense = [name for name in DENSE if name in took.ratio]
    hardest = min(dense, key=took.ratio.__getitem__)
    times = {name: f"{took.other[name]:.0f}" if name in took.other else "-" for name in (*DENSE, INT8)}
    useful = 2e-3 * tokens * cols * rows * layers.density / took.ours[hardest]
    ratios = [f"{took.ratio[hardest]:.2f}", f"{min(took.tenth[name] for name in dense):.2f}"]
    int8 = f"{took.ratio[INT8]:.2f}" if INT8 in took.ratio else "-"
    if took.packing == "dense":
        ratios, int8 = ["-", "-"], "-"
    return (
        f"| {tokens} | {cols} -> {rows} | {layers.density:.0%} | {took.layers} | {took.packing} "
        f"| {took.ours[hardest]:.0f} | {useful:.1f} | {times['torch']} | {times['onnxruntime']} | {times['OpenVINO']} "
        f"| **{ratios[0]}** | {ratios[1]} | {times[INT8]} | {int8} |"
    )


def main() -> None:
    """Run the grid and write the table."""
    parser = options(__doc__, ["768x768", "768x3072", "3072x768"], [0.5, 0.3, 0.2, 0.1, 0.05], 0.8)
    parser.add_argument("--model", type=Path, help="a pruned model's folder: its layers in place of random ones")
    parser.add_argument("--block", type=int, default=1, choices=(1, 4, 8), help="rows that are kept or gone together")
    args = parsed(parser)
    logging.disable(logging.WARNING)  # onnxruntime's quantiser, once a layer
    pattern = f"zeros in blocks of {args.block} x 1" if args.block > 1 else "unstructured zeros"
    lines = head(f"One float32 layer, {pattern}, {args.threads} thread(s), kernels: {isa()}")
    lines += [
        "Times in microseconds a call, medians of turns of 20 ms, in which so many different layers ('layers') are "
        "called one after the other; GF/s of useful work. "
        "Ratio: the fastest dense float32 side over secateur, each in turn with secateur; tenth: the same of the best "
        "tenths of both sides' times, for machines that others share. Packing: what the chooser took; 'dense' where it "
        "found nothing sparse worth it, which runs in torch.",
        "",
        "| tokens | K -> O | kept | layers | packing | secateur | GF/s | torch | onnxruntime | OpenVINO | ratio "
        "| tenth | ORT int8 | int8 ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        for tokens, layers in cells(args):
            lines.append(line(tokens, layers, measure(tokens, layers, args.threads, args.seconds)))
            print(lines[-1], flush=True)
            if args.out:
                args.out.write_text("\n".join(lines) + "\n")


def cells(args: argparse.Namespace) -> Iterator[tuple[int, Layers]]:
    """Tokens and layers of each line."""
    if args.model:
        yield from itertools.product(args.tokens, layers_of(args.model))
        return
    for tokens, cols, rows, density in grid(args):
        yield tokens, random_layers(cols, rows, density, how_many(tokens, cols, rows), args.block)


if __name__ == "__main__":
    main()
