"""Resident memory and load time of a 90% pruned encoder, packed against dense: a fresh process each.

    python benchmarks/kernels_memory.py MODEL --work FOLDER --out benchmarks/results/DATE-....md

MODEL is a folder of a text classifier or encoder; beside it a model of BERT-base's shape with random weights and masks
is measured. A process imports everything and runs the kernels and torch once, then loads its model and answers one
batch of 1 x 128; the table shows the growth since then. Files are in the page cache. Anonymous memory belongs to the
process, file memory is mapped and shared with the page cache.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from kernels_layer import head

LENGTH = 128
KEPT = 0.1


def status() -> dict[str, int]:
    """Bytes that this process holds, and held at most."""
    fields = re.findall(r"(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {name: int(kb) * 1024 for name, kb in fields}


def child(kind: str, folder: Path) -> None:
    """Load one model in this process, and print memory and seconds as JSON."""
    import torch
    import transformers

    from secateur import runtime
    from secateur.torch.open import load_model

    torch.set_num_threads(1)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    warm = transformers.BertModel(config).eval()
    for weight in warm.parameters():
        weight.data *= torch.rand_like(weight) < KEPT
    ids = torch.ones(1, LENGTH, dtype=torch.long)
    with torch.inference_mode():
        for model in (warm, runtime.compile(warm, tokens=LENGTH, measure=False)):
            model(input_ids=ids)
    before = status()
    start = time.perf_counter()
    model = runtime.load(folder) if kind == "packed" else load_model(folder)
    took = time.perf_counter() - start
    loaded = status()
    ids = torch.arange(LENGTH)[None] % model.config.vocab_size
    with torch.inference_mode():
        for _ in range(3):
            model(input_ids=ids)
    ran = status()
    print(json.dumps({"load_s": took, "before": before, "loaded": loaded, "ran": ran}))


def prepare(model: Path | None, work: Path) -> dict[str, int]:
    """Write a model dense and packed; the bytes of its weights."""
    import torch
    import transformers

    import secateur
    from secateur import runtime
    from secateur.torch.open import load_model

    if model is not None:
        host = secateur.open(load_model(model))
        host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 1 - KEPT))
        pruned = host.model
    else:
        pruned = transformers.BertModel(transformers.BertConfig()).eval()
        for module in pruned.encoder.modules():
            if type(module) is torch.nn.Linear:
                module.weight.data *= torch.rand_like(module.weight) < KEPT
    pruned.save_pretrained(work / "dense")
    fast = runtime.compile(pruned, tokens=LENGTH, measure=False)
    runtime.save(fast, work / "packed", overwrite=True)
    layers = [layer for layer in fast.secateur_report.layers if layer.format != "dense"]
    return {
        "all": sum(p.numel() * 4 for p in pruned.parameters()),
        "linear": sum(layer.dense_bytes for layer in layers),
        "packed": sum(layer.packed_bytes for layer in layers),
    }


def measure(name: str, model: Path | None, work: Path, times: int) -> list[str]:
    """The table's lines for one model."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = prepare(model, work)
    lines, dense = [], 1
    for kind in ("dense", "packed"):
        runs = []
        for _ in range(times):
            command = [sys.executable, __file__, str(work / kind), "--work", str(work), "--child", kind]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        run = sorted(runs, key=lambda r: r["load_s"])[times // 2]
        before = run["before"]

        def grown(when: str, what: str, run: dict = run, before: dict = before) -> str:
            return f"{(run[when][what] - before[what]) / 1e6:.1f}"

        resident = run["ran"]["VmRSS"] - before["VmRSS"]
        if kind == "dense":
            dense = resident
        linear = sizes["linear" if kind == "dense" else "packed"]
        lines.append(
            f"| {name} | {kind} | {sizes['all'] / 1e6:.1f} | {linear / 1e6:.1f} | "
            f"{grown('loaded', 'VmRSS')} | {grown('ran', 'VmRSS')} | {grown('ran', 'RssAnon')} | "
            f"{grown('ran', 'RssFile')} | {max(0, run['ran']['VmHWM'] - before['VmRSS']) / 1e6:.1f} | "
            f"{resident / sizes['all']:.2f} | {resident / dense:.2f} | {run['load_s']:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure both models and write the table; or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--child", choices=("dense", "packed"))
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.model)
        return
    lines = head("Resident memory of encoders with 10% of their linear weights kept")
    lines += [
        "MB (10^6 bytes); growth since the process had imported everything and run a small model of either kind.",
        "'Linear' is what the sparse layers take, dense or packed; 'peak' the most that was resident at any time;",
        "'share' what is resident after running over all dense weights, embeddings included; 'of dense' over what the",
        "dense model has resident then. Both files are mapped: of the embeddings only the pages read are resident.",
        "",
        "| model | form | all weights, dense | linear | resident: loaded | after running | anonymous | mapped "
        "| peak | share | of dense | load s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += measure("MiniLM, magnitude", args.model, args.work / "minilm", args.times)
    lines += measure("BERT-base's shape, random", None, args.work / "base", args.times)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
