"""A text classifier (MiniLM) pruned by magnitude, on every runtime: dense in torch, ONNX Runtime and OpenVINO, dense
int8 in ONNX Runtime, and on secateur's kernels in torch and in ONNX Runtime. One process each, pinned, in turns.

    python benchmarks/kernels_real.py MODEL --work FOLDER --prepare          # prunes and exports; once
    python benchmarks/kernels_real.py MODEL --work FOLDER --threads 1 --batch 1 --out rows.json
    python benchmarks/kernels_real.py MODEL --work FOLDER --table rows*.json --out benchmarks/results/DATE-....md

MODEL is a folder of a text classifier. The pruned models are not fine-tuned: the table shows times and agreement with
torch, not accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kernels_layer import head

from secateur.deploy import runner
from secateur.deploy.operator_library import installed_library

LENGTH = 128
DENSE = ("torch", "onnx", "openvino")
SPARSITIES = (0.8, 0.9)


def prepare(model: Path, work: Path) -> None:
    """Prune and export the models and programs that do not exist yet."""
    import secateur
    from secateur.deploy.jobs import torch_runtimes as ours
    from secateur.deploy.jobs.export import export, tokenizer_of
    from secateur.torch.open import load_model

    work.mkdir(parents=True, exist_ok=True)
    for sparsity in SPARSITIES:
        folder = work / f"pruned-{sparsity}"
        if not folder.exists():
            host = secateur.open(load_model(model))
            host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), sparsity))
            host.model.save_pretrained(folder)
            tokenizer_of(model).save_pretrained(folder)
        for name, options in (("onnx", {}), ("openvino", {}), ("int8", {"int8": True, "tolerance": 10.0})):
            if not (work / name).exists():  # zeros make no difference to these
                export(folder, "openvino" if name == "openvino" else "onnx", work / name, **options)
        if not (work / f"secateur-onnx-{sparsity}").exists():
            export(folder, "onnx", work / f"secateur-onnx-{sparsity}", sparse=True, tokens=LENGTH)
        for runtime in ("torch", "secateur"):
            artefact = work / (runtime if runtime == "torch" else f"secateur-torch-{sparsity}")
            if not artefact.exists():
                ours.write(load_model(folder), folder, runtime, artefact)


def names() -> list[str]:
    """Every artefact, the dense ones first."""
    return [*DENSE, "int8", *(f"secateur-{r}-{s}" for s in SPARSITIES for r in ("torch", "onnx"))]


def memory(work: Path) -> list[str]:
    """Bytes of the linear layers dense and packed, and how long loading takes."""
    from secateur import runtime
    from secateur.torch.open import load_model

    lines = ["", "| kept | linear layers, dense MB | packed MB | share | load dense s | load packed s |"]
    lines.append("|---|---|---|---|---|---|")
    for sparsity in SPARSITIES:
        start = time.perf_counter()
        model = load_model(work / f"pruned-{sparsity}")
        dense_s = time.perf_counter() - start
        fast = runtime.compile(model, tokens=LENGTH, measure=False)
        runtime.save(fast, work / f"packed-{sparsity}", overwrite=True)
        start = time.perf_counter()
        runtime.load(work / f"packed-{sparsity}")
        packed_s = time.perf_counter() - start
        layers = [layer for layer in fast.secateur_report.layers if layer.format != "dense"]
        dense, packed = sum(layer.dense_bytes for layer in layers), sum(layer.packed_bytes for layer in layers)
        lines.append(
            f"| {1 - sparsity:.0%} | {dense / 1e6:.1f} | {packed / 1e6:.1f} | {packed / dense:.2f} | {dense_s:.2f} | "
            f"{packed_s:.2f} |"
        )
    return lines


def table(files: list[Path], work: Path) -> list[str]:
    """Markdown of measured rows."""
    config = json.loads((work / f"pruned-{SPARSITIES[0]}" / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    lines = head(f"A text classifier of {layers} layers of {width}, pruned by magnitude, on every runtime")
    lines += [
        "No fine-tuning; weights and masks are those of the model given. 'dense' is the fastest of torch, ONNX",
        "Runtime and OpenVINO in float32 in the same run; ratios above one are faster. Start-up runs from the first",
        "line of the process to the first answer; secateur-torch packs (and measures, unless it is known) in it.",
    ]
    for file in files:
        run: dict[str, Any] = json.loads(file.read_text())
        rows = run["rows"]
        best = min(
            (name for name in DENSE if "median_ms" in rows.get(name, ())), key=lambda name: rows[name]["median_ms"]
        )
        lines += ["", f"## {run['threads']} thread(s), {run['batch']} x {LENGTH}; fastest dense: {best}", ""]
        lines += ["| runtime | ms | quartiles | times dense | times int8 | start-up s | peak MB | disk MB |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | | | | |")
                continue
            times_int8 = f"{rows['int8']['median_ms'] / row['median_ms']:.2f}" if "int8" in rows else "-"
            took, disk = row["median_ms"], runner.read(work / name)["bytes"]
            lines.append(
                f"| {name} | {took:.2f} | {row['low_ms']:.2f} - {row['high_ms']:.2f} | "
                f"**{rows[best]['median_ms'] / took:.2f}** | {times_int8} | "
                f"{row['startup_s']:.1f} | {row['peak_bytes'] / 1e6:.0f} | {disk / 1e6:.1f} |"
            )
    parities = {name: runner.read(work / name).get("parity") for name in names() if name.startswith("secateur-onnx")}
    lines += ["", "Largest relative difference to torch on the same pruned model, made-up inputs: "]
    lines[-1] += ", ".join(f"{name} {found['relative_error']:.1e}" for name, found in parities.items() if found) + "."
    return lines + memory(work)


def main() -> None:
    """One step of the three in the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="Some of the runtimes; fewer processes disturb two threads less.")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.model, args.work)
        return
    if args.table:
        text = "\n".join(table(args.table, args.work)) + "\n"
    else:
        places = {name: args.work / name for name in args.only or names()}
        described = {name: {} for name in places if name == "torch" or name.startswith("secateur-torch")}
        rows = runner.measure(
            places, args.batch, LENGTH, args.threads, args.turns, library=installed_library(), ours=described
        )
        text = json.dumps({"threads": args.threads, "batch": args.batch, "rows": rows}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
