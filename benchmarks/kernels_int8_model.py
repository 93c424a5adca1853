"""A real classifier (MiniLM) pruned in blocks of 1 x 4, in ONNX Runtime: dense in float32 and int8, and on secateur's
kernels in float32 and with int8 activations. One process each, pinned, in turns; errors against torch on the same
pruned model, made-up inputs.

    taskset -c 0 python benchmarks/kernels_int8_model.py MODEL --work FOLDER --out benchmarks/results/DATE-....md

MODEL is a folder of a text classifier; it is pruned by magnitude and not fine-tuned: the table shows times and errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kernels_layer import head
from kernels_real import LENGTH

from secateur.deploy import runner
from secateur.deploy.operator_library import installed_library

KINDS: dict[str, dict[str, Any]] = {
    "dense float32": {},
    "dense int8": {"int8": True},
    "secateur float32": {"sparse": True},
    "secateur int8": {"sparse": True, "value": "int8", "activations": "int8"},
}


def prepare(model: Path, work: Path, sparsity: float) -> dict[str, Path]:
    """Prune and export the programs that do not exist yet."""
    import secateur
    from secateur.deploy.jobs.export import export, tokenizer_of
    from secateur.torch.open import load_model

    folder = work / f"pruned-{sparsity}"
    if not folder.exists():
        host = secateur.open(load_model(model))
        host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Block(1, 4), sparsity))
        host.model.save_pretrained(folder)
        tokenizer_of(model).save_pretrained(folder)
    places = {name: work / f"{name.replace(' ', '-')}-{sparsity}" for name in KINDS}
    for name, options in KINDS.items():
        if not places[name].exists():
            export(folder, "onnx", places[name], tokens=LENGTH, tolerance=10.0, **options)
    return places


def main() -> None:
    """Prune, export, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true", help="export only")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lines = head(f"A MiniLM classifier pruned in blocks of 1 x 4, in ONNX Runtime, {args.threads} thread(s)")
    lines += [
        "Ratios above one are faster. Error: relative, of the outputs, against torch on the same pruned model.",
        "",
        "| zeros | batch x length | program | ms | quartiles | times dense float32 | times dense int8 | error "
        "| disk MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity in args.sparsities:
        places = prepare(args.model, args.work, sparsity)
        if args.prepare:
            continue
        for batch in args.batches:
            rows = runner.measure(places, batch, LENGTH, args.threads, args.turns, library=installed_library())
            float32, int8 = (rows[name]["median_ms"] for name in ("dense float32", "dense int8"))
            for name, row in rows.items():
                info, took = runner.read(places[name]), row["median_ms"]
                lines.append(
                    f"| {sparsity:.0%} | {batch} x {LENGTH} | {name} | {took:.2f} | {row['low_ms']:.2f} - "
                    f"{row['high_ms']:.2f} | {float32 / took:.2f} | **{int8 / took:.2f}** | "
                    f"{info['parity']['relative_error']:.1e} | {info['bytes'] / 1e6:.1f} |"
                )
                print(lines[-1], flush=True)
    if args.out and not args.prepare:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
