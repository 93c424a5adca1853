"""Writes the kept files: one small example of everything that secateur writes, with the numbers that it gave.

    python -m tests.kept.write FOLDER

A change of a format adds a folder beside the old ones; the old ones stay, and must go on to load.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import secateur
from secateur import runtime
from tests import zoo
from tests.text_models import write_classifier
from tests.zoo import Sentence

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
FOLDERS = {
    # name: (model, units that stay by axis, share of zeros or None)
    "bert-uneven": (lambda: zoo.bert(**SMALL), {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(20)}, None),
    "bert-stock": (lambda: zoo.bert(**SMALL), {"L0.ffn": range(8), "L1.ffn": range(4, 12)}, None),
    "bert-zeros": (lambda: zoo.bert(**SMALL), {}, 0.8),
    "llama-kv-zeros": (lambda: zoo.llama(**SMALL), {"L0.kv": [1, 3], "L1.ffn": range(16)}, 0.5),
    "llama-width": (lambda: zoo.llama(**SMALL), {"hidden": range(8)}, None),
    "gpt2-layers": (lambda: zoo.gpt2(n_embd=16, n_inner=24), {"layers": [0, 2], "L2.head": [1, 2]}, None),
    "t5-heads": (
        lambda: zoo.t5(d_model=16, d_kv=4, d_ff=24, num_layers=2),
        {"encoder.head": [0, 3], "decoder.L0.ffn": range(9)},
        None,
    ),
    "vit-ffn": (lambda: zoo.vit(**SMALL), {"L0.ffn": range(10), "L1.head": [0, 1, 2]}, None),
    "mixtral-experts": (
        lambda: zoo.mixtral(hidden_size=16, intermediate_size=12),
        {"L0.expert": [0, 1, 3], "L1.ffn": range(8)},
        None,
    ),
}


def answer(model, batch):
    """Outputs for a batch of tensors."""
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(*batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def numbers(place, model, batch):
    """Write what a model was given and what it answered."""
    tensors = {f"input {name}": value.contiguous() for name, value in batch.items()}
    save_file({**tensors, "answer": answer(model, batch).contiguous()}, place / "numbers.safetensors")


def pruned(model, keep, zeros):
    """A host with units and single weights removed, and the plan."""
    example = zoo.inputs(model) if isinstance(model, transformers.PreTrainedModel) else None
    host = secateur.open(model, example)
    units = secateur.Plan({name: np.array(list(kept)) for name, kept in keep.items()}).check(host.layout)
    plan = units
    if zeros is not None:
        plan = units.merge(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), zeros))
    host.apply(plan)
    host.resize(plan)
    return host, plan


def folders(home):
    """Folders for `from_pretrained`, with a plan in each."""
    for name, (make, keep, zeros) in FOLDERS.items():
        place = home / "folders" / name
        place.mkdir(parents=True)
        host, plan = pruned(make(), keep, zeros)
        host.save(place / "model", plan)
        numbers(place, host.model, zoo.inputs(host.model))


def plain(home):
    """A plain PyTorch module."""
    torch.manual_seed(0)
    model = Sentence().eval()
    ids = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    host = secateur.open(model, (ids,))
    plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Unit("ffn"), 0.5)
    host.resize(plan)
    place = home / "plain"
    place.mkdir()
    host.save(place / "model", plan)
    numbers(place, lambda ids: host.model(ids), {"ids": ids})


def plans(home):
    """A plan with units, masks and mended weights, and its arrays as JSON."""
    host = secateur.open(zoo.llama(**SMALL))
    batches = [zoo.inputs(host.model, seed) for seed in range(4)]
    pattern = secateur.NM(keep=2, of=4)
    weights = secateur.prune(host, pattern=pattern, data=batches, repair=secateur.repair.sparsegpt)
    units = secateur.prune(host, secateur.criteria.magnitude, secateur.Unit("ffn"), 0.5)
    plan = units.merge(weights)
    place = home / "plan"
    place.mkdir()
    plan.save(place)
    said = {
        "keep": {name: np.asarray(kept).tolist() for name, kept in plan.keep.items()},
        "kept": {name: int(mask.sum()) for name, mask in plan.masks.items()},
        "weights": {name: float(np.abs(array).sum(dtype="float64")) for name, array in plan.weights.items()},
    }
    (place / "numbers.json").write_text(json.dumps(said, indent=1) + "\n")


def compiled(home):
    """Models for secateur's own kernels: a chain of layers, blocks of a decoder, N:M in int8, blocks."""
    shapes = {
        "bert-chain": (zoo.bert, {}, {}),
        "bert-uneven": (zoo.bert, {"L0.ffn": range(32), "L1.head": [0, 2]}, {}),
        "llama-steps": (zoo.llama, {}, {"value": "int8", "tokens": 4}),
        "bert-blocks": (zoo.bert, {}, {"value": "float16", "tokens": 8}),
    }
    for name, (make, keep, options) in shapes.items():
        host = secateur.open(make(num_hidden_layers=2))
        pattern = secateur.NM(keep=2, of=4) if name == "llama-steps" else secateur.Element()
        pattern = secateur.Block(4, 1) if name == "bert-blocks" else pattern
        share = None if name == "llama-steps" else 0.8
        host.apply(secateur.prune(host, secateur.criteria.magnitude, pattern, share))
        host.resize(secateur.Plan({axis: np.array(list(kept)) for axis, kept in keep.items()}))
        batch = zoo.inputs(host.model)
        fast = runtime.compile(host.model, measure=False, example=batch, **options)
        place = home / "compiled" / name
        place.mkdir(parents=True)
        runtime.save(fast, place / "model")
        numbers(place, fast, batch)


def artefacts(home, targets):
    """A classifier with another size in every layer, and a decoder, for runtimes."""
    from secateur.deploy import export
    from secateur.deploy.onnx_graph import sparse

    pack = sparse.pack_worthy  # without timing: a tiny layer is as fast dense
    sparse.pack_worthy = lambda weight, **options: pack(weight, **{**options, "measure": False})

    work = home / "work"
    host = secateur.open(write_classifier(work))
    first, second = host.layout.of_kind("ffn")
    host.resize(secateur.Plan({first.name: np.arange(20), second.name: np.arange(48)}))
    host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.8))
    host.save(work / "small")
    llama = zoo.llama(**SMALL)
    wishes = {
        "onnx": (work / "small", "onnx", {}),
        "onnx-int8": (work / "small", "onnx", {"int8": True}),
        "onnx-sparse": (work / "small", "onnx", {"sparse": True}),
        "onnx-generate": (llama, "onnx", {"generate": True}),
        "openvino": (work / "small", "openvino", {}),
        "executorch": (work / "small", "executorch", {"batch": 2, "length": 8}),
        "litert": (work / "small", "litert", {"batch": 2, "length": 8}),
    }
    for name, (source, target, options) in wishes.items():
        if target not in targets:
            continue
        place = home / "artefacts" / name
        place.mkdir(parents=True)
        with contextlib.redirect_stdout(sys.stderr):
            export(source, target, place / "model", **options)
        _program_numbers(place)
    shutil.rmtree(work)


def results(home):
    """What the script of an export kit wrote, and a latency table."""
    from secateur.cost import Curve, LatencyTable
    from secateur.deploy import write_kit

    with tempfile.TemporaryDirectory() as work:
        source = write_classifier(Path(work) / "dense")
        write_kit([source], Path(work) / "kit", ["onnx"], batch=(1, 2), length=(4,), turns=1)
        subprocess.run([sys.executable, Path(work) / "kit" / "device.py"], check=True, stdout=sys.stderr)
        (home / "results").mkdir()
        for name in ("kit.json", "results.json"):
            shutil.copyfile(Path(work) / "kit" / name, home / "results" / name)
    curves = {"ffn 4": Curve((1, 2, 4), (-0.3, -0.2, 0.0)), "head 2": Curve((1, 2), (-0.1, 0.0))}
    table = LatencyTable("onnx", 8, 64, 1, 12.5, curves, {"L0.ffn": "ffn 4", "L0.head": "head 2"}, -0.05)
    said = {"table": table.as_json(), "sizes": {"L0.ffn": 2, "L0.head": 1}}
    said["predicted"] = table.predict(said["sizes"])
    (home / "results" / "latency.json").write_text(json.dumps(said, indent=1) + "\n")


def keras_files(home):
    """A Keras model with units and single weights removed, as a file and as an artefact."""
    import keras

    from secateur.deploy.jobs.keras_jobs import export
    from tests.keras import models

    keras.utils.set_random_seed(0)
    host = secateur.open(models.transformer())
    units = secateur.Plan({host.layout.of_kind("head")[0].name: np.array([0, 3])}).check(host.layout)
    plan = units.merge(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.5))
    host.apply(plan)
    host.resize(plan)
    place = home / "keras"
    place.mkdir()
    host.save(place / "model", plan)
    ids = np.arange(14, dtype="int32").reshape(2, 7) % models.VOCAB
    save_file(
        {"ids": torch.from_numpy(ids), "answer": torch.tensor(np.asarray(host.model(ids)))},
        place / "numbers.safetensors",
    )
    with contextlib.redirect_stdout(sys.stderr):
        export(host.model, "litert", place / "artefact", batch=2)


def _program_numbers(place):
    """What a program answers to made-up inputs."""
    from safetensors.numpy import save_file as save_arrays

    from secateur.deploy.runner import load, made_up, read, sizes_for

    for name, graph in read(place / "model")["graphs"].items():
        feed = made_up(graph, sizes_for(graph, 2, 8))
        found = load(place / "model", name)(feed)
        given = {f"input {key}": np.ascontiguousarray(value) for key, value in feed.items()}
        save_arrays(
            {**given, **{f"output {k}": np.ascontiguousarray(v) for k, v in found.items()}},
            place / f"numbers-{name}.safetensors",
        )


def main(home, targets):
    """Everything that an environment with these targets can write."""
    home.mkdir(parents=True, exist_ok=True)
    if "onnx" in targets:
        folders(home)
        plain(home)
        plans(home)
        compiled(home)
        results(home)
    if "keras" in targets:
        keras_files(home)
    artefacts(home, targets)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["onnx", "openvino"])
