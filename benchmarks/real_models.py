"""Removal on real weights: masked against shrunk, reload and generation, for MiniLM, SmolLM2-135M and DINOv2-S.

Run `python benchmarks/real_models.py [--write]`; benchmarks/models.py says which packages it needs. `--write` puts a
dated table under benchmarks/results/.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch

import secateur.torch.files.saving
from secateur.check import difference, verify
from secateur.plan import Plan
from secateur.torch.host import TorchHost

HEADER = "| model | removed | masked vs shrunk | reload | second reload | generate | parameters |"
META = """
import pathlib, re, time, torch, transformers
from secateur.torch.shrink.probe import derive
config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
start = time.perf_counter()
layout = derive(model, example)
seconds = time.perf_counter() - start
# VmHWM, as ru_maxrss of a started process begins at the size of the process that started it.
peak_kb = int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
print(seconds, peak_kb / 1e6, len(layout.axes))
"""


def plans(host: TorchHost) -> Iterator[tuple[str, dict[str, Any]]]:
    """Removals of each kind, another size in every layer, and all of them together."""
    random = np.random.default_rng(0)
    parts: dict[str, dict[str, Any]] = {}
    for kind in ("head", "kv", "ffn"):
        keep = {}
        for number, axis in enumerate(host.layout.of_kind(kind)):
            if axis.parts:
                outer = host.layout.axis(axis.parts[0]).size
                inner = axis.size // outer
                count = 1 + number % (inner - 1)
                keep[axis.name] = np.sort(
                    np.concatenate([i * inner + random.permutation(inner)[:count] for i in range(outer)])
                )
            else:
                count = max(1, axis.size // 2 - (number % 3) * max(1, axis.size // 10))
                keep[axis.name] = np.sort(random.permutation(axis.size)[:count])
        if keep:
            parts[kind] = keep
            yield f"{kind}s" if kind != "ffn" else kind, keep
    for axis in host.layout.of_kind("layer"):
        parts["layer"] = {axis.name: np.flatnonzero(np.arange(axis.size) % 3 != 1)}
        yield "layers", parts["layer"]
    together = [parts.get("head", {}), parts.get("ffn", {}), parts.get("layer", {})]
    yield "all together", {name: units for part in together for name, units in part.items()}


def row(name: str, removed: str, host: TorchHost, keep: dict[str, Any], folder: Path) -> str:
    """One line of the table; raises when masked and shrunk differ."""
    plan = Plan(keep)
    verdict = verify(host, plan, [host.example])
    small = host.copy()
    small.resize(plan)
    secateur.torch.files.saving.save(small.model, folder / "a", overwrite=True)
    loaded = type(small.model).from_pretrained(folder / "a").eval()
    loaded.save_pretrained(folder / "b")
    again = type(small.model).from_pretrained(folder / "b").eval()
    hosts = [small, *(TorchHost(m, host.example, layout=small.layout) for m in (loaded, again))]
    outputs = [h.outputs(host.example) for h in hosts]
    generate = "-"
    if host.model.can_generate():
        generate = "equal" if _generates_alike([h.model for h in hosts], host.example) else "DIFFERS"
    before, after = (sum(p.numel() for p in h.model.parameters()) / 1e6 for h in (host, small))
    return (
        f"| {name} | {removed} | {verdict.difference:.1e} | {difference(outputs[0], outputs[1]):.1e} | "
        f"{difference(outputs[0], outputs[2]):.1e} | {generate} | {before:.1f} M to {after:.1f} M |"
    )


def _generates_alike(shrunk: list[Any], example: Any) -> bool:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    first = {k: v[:1] for k, v in example.items()}
    texts = [model.generate(**first, use_cache=True, **options) for model in shrunk]
    texts.append(shrunk[0].generate(**first, use_cache=False, **options))
    return all(torch.equal(texts[0], text) for text in texts)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "MiniLM-L6": models.minilm,
    "SmolLM2-135M": models.smollm2,
    "DINOv2-S": models.dinov2,
}


def main() -> None:
    """Print the table, and write it when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    print(*lines, sep="\n", flush=True)
    for name in options.models:
        host = TorchHost(*MODELS[name]())
        for removed, keep in plans(host):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    lines.append(row(name, removed, host, keep, Path(folder)))
                except Exception as error:  # a failure is a result
                    lines.append(f"| {name} | {removed} | FAILED: {' '.join(str(error).split())[:150]} | | | | |")
            print(lines[-1], flush=True)
    done = subprocess.run([sys.executable, "-c", META], capture_output=True, text=True, check=True)
    seconds, gigabytes, axes = done.stdout.split()
    lines += [
        "",
        f"Layout of an 8B Llama on the meta device, removal tried out: {float(seconds):.1f} s, peak memory of the "
        f"process {float(gigabytes):.2f} GB, {axes} axes.",
    ]
    print(lines[-1])
    if options.write:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
        head = [
            "# Removal on real weights",
            "",
            f"{datetime.date.today()}, `python benchmarks/real_models.py --write`, {versions}, "
            f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, float32.",
            "",
            "Another number of units remains in every layer, chosen at random. Differences are the largest of any "
            "output, relative where outputs exceed 1. `generate`: 20 greedy tokens of the shrunk model with and "
            "without cache, of the reloaded and of the twice reloaded one. SmolLM2 is dequantised from 4 bits; the "
            "weights and positions of DINOv2 are those of its ONNX file, its input is noise of 98 x 98 pixels.",
            "",
        ]
        target = Path(__file__).parent / "results" / f"{datetime.date.today()}-real-models.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
