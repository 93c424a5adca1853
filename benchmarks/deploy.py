"""Exports every model to every target, and times what pruning gains on each.

Each stage stores its results under .cache/deploy, so that it can run alone; `write` writes the dated Markdown:

    python benchmarks/deploy.py models            train and prune (MiniLM on 1,000 reviews), convert the others
    python benchmarks/deploy.py table             targets x models: parity, or why not
    python benchmarks/deploy.py latency RUNTIME   MiniLM dense, halved and uneven, batch 8 x 64, one thread
    python benchmarks/deploy.py int8              8-bit weights on top: parity and time
    python benchmarks/deploy.py grid RUNTIME      the latency table, and 10 random configurations against it
    python benchmarks/deploy.py write
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import transformers
from deploy_grid import BATCH, CACHE, LENGTH, keep, make_grid
from deploy_report import write

from secateur.cost import macs
from secateur.data.table import Table
from secateur.deploy import runner
from secateur.deploy.jobs import material, parity, results
from secateur.deploy.jobs.bench import bench, installed
from secateur.deploy.jobs.export import export
from secateur.deploy.target import Port, find, load
from secateur.errors import SecateurError
from secateur.files import write_json
from secateur.jobs.demo import Settings, demo_rows, dense_model
from secateur.plan import Plan
from secateur.tasks import Options
from secateur.tasks import find as find_task
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model, open_folder
from secateur.training.fine_tune import fine_tune

ROWS, SEED = 200, 0
TARGETS = ("onnx", "openvino", "executorch", "litert")
FIXED = ("executorch", "litert")
"""Targets whose shapes are fixed on export."""
IMAGE = 98
"""Pixels of DINOv2's images here: seven patches a side."""
NAMES = {
    "minilm-dense": "MiniLM classifier, dense",
    "minilm-half": "MiniLM classifier, half of heads and FFN",
    "minilm-uneven": "MiniLM classifier, another size in every layer",
    "smollm2-uneven": "SmolLM2-135M, another size in every layer",
    "dinov2-uneven": "DINOv2-S, another size in every layer",
    "whisper-tiny-uneven": "Whisper, tiny, random, uneven",
    "t5-tiny-uneven": "T5, tiny, random, uneven",
}
GENERATES = ("smollm2-uneven", "whisper-tiny-uneven", "t5-tiny-uneven")


def halved(host: TorchHost) -> Plan:
    """The first half of the heads and neurons of every layer."""
    axes = [axis for kind in ("head", "ffn") for axis in host.layout.of_kind(kind)]
    return Plan({axis.name: np.arange(axis.size // 2) for axis in axes})


def uneven(host: TorchHost, seed: int = SEED) -> Plan:
    """Between a third and all of the heads (or groups of heads) and neurons, another number in every layer."""
    random = np.random.default_rng(seed)
    keep = {}
    kinds = ("kv", "ffn") if host.layout.of_kind("kv") else ("head", "ffn")
    for axis in (axis for kind in kinds for axis in host.layout.of_kind(kind)):
        if axis.frozen or axis.parts:
            continue
        count = int(random.integers(-(-axis.size // 3), axis.size + 1))
        keep[axis.name] = np.sort(random.permutation(axis.size)[:count])
    return Plan(keep)


def pruned(
    source: Path | Any, name: str, choose: Callable[[TorchHost], Plan], example: Any = None, train: Table | None = None
) -> Path:
    """The pruned folder, under the cache, of a model (a folder or a module), fine-tuned for an epoch on `train`."""
    folder = CACHE / "models" / name
    if not folder.exists():
        if isinstance(source, Path):
            host = open_folder(source, example, dtype=torch.float32)
        else:
            host = TorchHost(source, example)
        plan = choose(host).check(host.layout)
        host.resize(plan)
        tokenizer = load_tokenizer(source) if isinstance(source, Path) and example is None else None
        if train is not None:
            task = find_task(host.model, tokenizer, options=Options(max_length=LENGTH))
            fine_tune(host, task, task.encode(train), epochs=1, learning_rate=2e-4, seed=SEED, progress=False)
        host.save(folder, plan, tokenizer=tokenizer)
    return folder


def make_models() -> None:
    """Every folder of the table."""
    transformers.logging.set_verbosity_error()
    train, _ = demo_rows(Settings(train_rows=1000))
    link = CACHE / "models" / "minilm-dense"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        dense, _ = dense_model(Settings(train_rows=1000, dense_epochs=2), CACHE, train, progress=False)
        link.symlink_to(dense.resolve())
    pruned(link, "minilm-half", halved, train=train)
    pruned(link, "minilm-uneven", uneven, train=train)
    pruned(models.smollm2_folder(), "smollm2-uneven", uneven)
    images = {"pixel_values": torch.rand(2, 3, IMAGE, IMAGE)}
    folder = pruned(models.dinov2_folder(), "dinov2-uneven", uneven, images)
    size = {"height": IMAGE, "width": IMAGE}
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "BitImageProcessor", "crop_size": size})
    torch.manual_seed(SEED)
    for name, (model, example) in {"whisper-tiny-uneven": whisper(), "t5-tiny-uneven": t5()}.items():
        pruned(model.eval(), name, uneven, example)


def whisper() -> tuple[Any, dict[str, torch.Tensor]]:
    """A Whisper of two layers with random weights."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_model": 64, "vocab_size": 200, "num_mel_bins": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **special, max_source_positions=50, max_target_positions=64)
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(2, 20, 100),
        "decoder_input_ids": torch.randint(3, 200, (2, 7)),
    }


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    """A T5 of two layers with random weights."""
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=200, decoder_start_token_id=0
    )
    ids = torch.randint(3, 200, (2, 9))
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :5],
    }


def folder_of(name: str) -> Path:
    """A folder that `make_models` wrote."""
    return (CACHE / "models" / name).resolve()


def reviews() -> Table:
    """Reviews that no model was trained on, shuffled."""
    _, test = demo_rows(Settings(train_rows=1000))
    return test.take(range(ROWS))


def make_table(targets: list[str], names: list[str]) -> None:
    """Export every model to every target; rows of an earlier run are not made again."""
    transformers.logging.set_verbosity_error()
    for target in targets:
        for name in names:
            for generate in (True, False) if name in GENERATES and target in ("onnx", "openvino") else (False,):
                kept_as = f"table-{target}-{name}{'-generate' if generate else ''}"
                if list(kept(kept_as)):
                    continue
                row = export_one(name, target, generate=generate)
                print(name, target, "generate" if generate else "", row, flush=True)
                keep(kept_as, row)


def export_one(name: str, target: str, *, generate: bool) -> dict[str, Any]:
    """Export one model: its parity, or the sentence of the refusal."""
    if name.startswith("minilm") and artefact_of(name, target).exists():
        return parity_again(name, target)
    text = name.startswith(("minilm", "smollm2"))
    data = None
    if text:
        data = reviews() if name.startswith("minilm") else reviews().take(range(16))
    sizes: dict[str, int] = {}
    if target in FIXED:
        sizes = {"batch": BATCH}
        if name.startswith(("minilm", "smollm2", "t5")):
            sizes["length"] = LENGTH
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        artefact = artefact_of(name, target) if name.startswith("minilm") else Path(work) / "out"
        try:
            exported = export(folder_of(name), target, artefact, data=data, generate=generate, overwrite=True, **sizes)
        except SecateurError as error:
            return {"refused": str(error)}
        seconds = time.perf_counter() - start
        return {
            "parity": asdict(exported.parity) if exported.parity else exported.generation,
            "bytes": exported.bytes,
            "s": seconds,
        }


def parity_again(name: str, target: str) -> dict[str, Any]:
    """Parity of an artefact that exists."""
    artefact, folder = artefact_of(name, target), folder_of(name)
    model = load_model(folder, dtype=torch.float32).eval()
    ports = [Port(**{**port, "at_most": {int(k): v for k, v in port["at_most"].items()}}) for port in _inputs(artefact)]
    rows = material.read(model, reviews(), folder, length=LENGTH if target in FIXED else None)
    batches = parity.batches(model, rows, find(target), ports)
    agreement = parity.compare(model, load(artefact), batches, results.TOLERANCE)
    return {"parity": asdict(agreement), "bytes": runner.read(artefact)["bytes"]}


def _inputs(place: Path) -> list[dict[str, Any]]:
    return runner.read(place)["graphs"]["model"]["inputs"]


def artefact_of(name: str, target: str, *, int8: bool = False) -> Path:
    """Where the artefact of a MiniLM is kept, so that a timed run is short."""
    return CACHE / "artefacts" / f"{name}-{target}{'-int8' if int8 else ''}"


def make_latency(runtime: str, *, int8: bool = False) -> None:
    """The MiniLMs side by side on one runtime; with 8-bit weights, beside the dense one in float32.

    A call that has to export something times nothing: call it again, on a quiet machine.
    """
    folders = {"float32": artefact_of("minilm-dense", runtime)} if int8 else {}
    exported = False
    for name in ("minilm-dense", "minilm-half", "minilm-uneven"):
        folders[name] = folder_of(name)
        if runtime in TARGETS:
            artefact = artefact_of(name, runtime, int8=int8)
            if not artefact.exists():
                sizes = {} if runtime in ("onnx", "openvino") else {"batch": BATCH, "length": LENGTH}
                export(folder_of(name), runtime, artefact, data=reviews(), int8=int8, **sizes)
                exported = True
            keep(f"parity-{artefact.name}", runner.read(artefact)["parity"])
            folders[name] = artefact
    if exported:
        return
    table = bench(list(folders.values()), [runtime], batch=[BATCH], length=[LENGTH], turns=20)
    for timing, name in zip(table.timings, folders, strict=True):
        print(runtime, name, f"{timing.median_ms:.2f} ms, {timing.ratio:.3f}", timing.error, flush=True)
        keep(f"latency-{runtime}{'-int8' if int8 else ''}-{name}", asdict(timing))


def kept(pattern: str) -> Iterator[tuple[str, Any]]:
    """Stored results by name."""
    for path in sorted(CACHE.glob(f"{pattern}.json")):
        yield path.stem, json.loads(path.read_text())


def mac_ratios() -> dict[str, float]:
    """Multiply-accumulates of each MiniLM at batch 8 x 64, as a share of the dense one."""
    for _, known in kept("macs"):
        return known
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": ids}
    names = ("minilm-dense", "minilm-half", "minilm-uneven")
    counts = {n: macs(TorchHost(load_model(folder_of(n), dtype=torch.float32), example).layout) for n in names}
    ratios = {name: count / counts["minilm-dense"] for name, count in counts.items()}
    keep("macs", ratios)
    return ratios


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["models", "table", "latency", "int8", "grid", "write"])
    parser.add_argument("runtime", nargs="?")
    parser.add_argument("--models", nargs="*", default=list(NAMES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "models":
        make_models()
    elif options.stage == "table":
        make_table([options.runtime] if options.runtime else list(TARGETS), options.models)
    elif options.stage == "latency":
        for runtime in [options.runtime] if options.runtime else installed():
            make_latency(runtime)
    elif options.stage == "int8":
        for runtime in [options.runtime] if options.runtime else ("onnx", "openvino"):
            make_latency(runtime, int8=True)
    elif options.stage == "grid":
        make_grid(options.runtime or "onnx", folder_of("minilm-dense"))
    else:
        write(CACHE, NAMES, mac_ratios())


if __name__ == "__main__":
    main()
