"""Folders of models: Hugging Face folders, plain modules, compiled models, artefacts on ONNX Runtime, Keras files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import SecateurError
from tests.fuzz.formats import KEPT, kept
from tests.fuzz.mutate import Case
from tests.fuzz.run import Format

HASHES = "secateur-hashes.json"
MOST = 2**24
"""The most numbers of a model that is run: a file may describe a larger one without harm."""


class Random:
    """Gives each load other random numbers, so that weights which come from no file show."""

    count = 0

    @classmethod
    def next(cls) -> None:
        import torch

        cls.count += 1
        torch.manual_seed(cls.count)


def answer(model: Any, feed: Mapping[str, Any]) -> Any:
    """The output of a loaded model, or the type of the error: what does not fit its inputs may be refused there."""
    import torch

    if sum(p.numel() for p in model.parameters()) > MOST:
        return "large"
    try:
        with torch.inference_mode():
            found = model(**feed)
    except Exception as error:
        return type(error).__name__
    return found if isinstance(found, torch.Tensor) else found.logits if hasattr(found, "logits") else found[0]


def _feed(place: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(KEPT.joinpath(place).parent / "numbers.safetensors")
    return {name.removeprefix("input "): tensor for name, tensor in tensors.items() if name != "answer"}


# -- Hugging Face folders ---------------------------------------------------------------------------------------------


def _model_seeds() -> Mapping[str, Case]:
    seeds = {f"{name}": {**case, "seed.txt": name.encode()} for name, case in kept("folders/*/model").items()}
    name, case = next((n, c) for n, c in seeds.items() if "bert-zeros" in n)
    return {**seeds, f"{name}-sharded": sharded(case), f"{name}-tokens": with_schedule(case)}


def with_schedule(case: Case) -> Case:
    """A folder of a BERT with a schedule of tokens in its manifest, and without a checksum, so that lies are read."""
    config = json.loads(case["config.json"])
    config["quantization_config"].pop("checksum", None)
    config["quantization_config"]["tokens"] = {
        "schedule": {"keep": [60] * config["num_hidden_layers"], "method": "prune", "pooled": True},
        "sites": {
            "stack": "bert.encoder.layer",
            "inner": "attention",
            "feed_forward": "",
            "arguments": {"[0][1]": [2, 3]},
        },
    }
    return case | {"config.json": json.dumps(config).encode()}


def sharded(case: Case) -> Case:
    """A model folder with its weights in two files and an index."""
    from safetensors.torch import load, save

    tensors = load(case["model.safetensors"])
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, part in halves.items() for n in part}}
    files = {file: save({n: tensors[n] for n in part}, {"format": "pt"}) for file, part in halves.items()}
    rest = {name: data for name, data in case.items() if name != "model.safetensors"}
    return rest | files | {"model.safetensors.index.json": json.dumps(index).encode()}


def _read_model(folder: Path) -> Any:
    from secateur.torch.open import load_model

    Random.next()
    model = load_model(folder)
    return answer(model, _feed((folder / "seed.txt").read_text()))


def _read_by_class(folder: Path) -> Any:
    from secateur.torch.files.saving import load

    Random.next()
    return answer(load(folder).eval(), _feed((folder / "seed.txt").read_text()))


def _read_entries(folder: Path) -> Any:
    from secateur.torch.files.safetensors_shards import entries_of, read_tensor

    return {name: read_tensor(entry) for name, entry in entries_of(folder).items()}


def _hash_seeds() -> Mapping[str, Case]:
    """The sharded folder with the hashes of its files."""
    name, case = next((n, c) for n, c in _model_seeds().items() if n.endswith("-sharded"))
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in case.items()}
    return {name: case | {HASHES: json.dumps({"format": 1, "sha256": hashes}).encode()}}


def _read_hashes(folder: Path) -> Any:
    from secateur.torch.files.saving import check_unchanged

    return check_unchanged(folder)


# -- plain modules and compiled models --------------------------------------------------------------------------------


def _read_plain(folder: Path) -> Any:
    import secateur
    from tests.zoo import Sentence

    Random.next()
    return answer(secateur.load(folder, Sentence().eval()), _feed("first/plain/model"))


def _compiled_seeds() -> Mapping[str, Case]:
    return {name: {**case, "seed.txt": name.encode()} for name, case in kept("compiled/*/model").items()}


def _read_compiled(folder: Path) -> Any:
    from secateur import runtime

    Random.next()
    model = runtime.load(folder)
    return answer(model, _feed((folder / "seed.txt").read_text()))


# -- artefacts --------------------------------------------------------------------------------------------------------


def _onnx_seeds() -> Mapping[str, Case]:
    return {name: case for name, case in kept("artefacts/*/model").items() if "onnx" in name and "generate" not in name}


def _onnx_files(name: str) -> bool:
    return name in ("artefact.json", "model.onnx.data")


def _read_onnx(folder: Path) -> Any:
    from secateur.deploy import target

    info = target.read(folder)
    program = target.load(folder)
    from secateur.deploy import runner

    found = program(runner.made_up(info["graphs"]["model"], runner.sizes_for(info["graphs"]["model"], 2, 5)))
    return {name: np.asarray(value) for name, value in found.items()}


# -- Keras ------------------------------------------------------------------------------------------------------------


def _read_keras(folder: Path) -> Any:
    from secateur.keras.files import load
    from secateur.plan import Plan

    model = load(folder)
    plan = Plan.load(folder)
    return [np.asarray(weight) for weight in model.get_weights()], plan.sizes


def _keras_targets(name: str) -> bool:
    return name == "model.keras"


def _is_weights(name: str) -> bool:
    return name not in ("seed.txt", "generation_config.json") and not name.startswith("plan")


MODELS = (
    Format("model-folder", _model_seeds, _read_model, (SecateurError,), _is_weights),
    Format("model-by-class", _model_seeds, _read_by_class, (SecateurError,), _is_weights),
    Format(
        "safetensors",
        _model_seeds,
        _read_entries,
        (SecateurError,),
        lambda name: "safetensors" in name and _is_weights(name),
    ),
    Format("hashes", _hash_seeds, _read_hashes, (SecateurError,), lambda name: name in (HASHES, "config.json")),
    Format("plain-module", lambda: kept("plain/model"), _read_plain, (SecateurError,), _is_weights),
    Format("compiled", _compiled_seeds, _read_compiled, (SecateurError,), _is_weights),
    Format("onnx", _onnx_seeds, _read_onnx, (SecateurError,), _onnx_files),
)
KERAS = (Format("keras", lambda: kept("keras/model"), _read_keras, (SecateurError,), _keras_targets, alone=True),)
"""TensorFlow takes long to import, so these run only when they are named."""
