"""export and bench for Keras models: write artefacts for runtimes, compare them with Keras, and time them side by side,
as the other jobs do for PyTorch models. PyTorch is not needed.
"""

import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from keras import tree

from secateur.deploy import runner
from secateur.deploy.jobs.comparison import Comparison
from secateur.deploy.jobs.results import BATCHES, TOLERANCE, Artefact, Bench, Parity, Timing, short_names, words
from secateur.deploy.jobs.timing import Say, Shape, in_turn
from secateur.errors import ModelError
from secateur.files import new_folder, write_json
from secateur.keras import files
from secateur.keras.batches import flat, run
from secateur.keras.export import SUFFIX, TARGETS
from secateur.keras.export import export as write_program
from secateur.keras.guard import check_model
from secateur.keras.host import symbols
from secateur.keras.naming import layers
from secateur.keras.threads import set_threads

KERAS = "keras"
FIXED = ("litert", "tflite")
"""Targets that hold one shape."""
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
ALIASES = {"savedmodel": "saved_model", "onnxruntime": "onnx", "tensorflow": KERAS}
DEFAULT = (KERAS, "litert", "onnx", "openvino")
"""Runtimes that `bench` takes when none are named, as far as they are installed."""


def export(
    model: keras.Model,
    to: str,
    output: Path | str,
    *,
    data: Any = None,
    batch: int | None = None,
    length: int | None = None,
    sparse: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Artefact:
    """Write a model for a runtime, run it there, and compare.

    to: litert, tflite (TensorFlow's converter), onnx, openvino or saved_model.
    data: inputs of the model to compare on; made up when left out.
    batch, length: the only sizes that LiteRT takes; length is for models whose inputs leave it open.
    sparse: LiteRT's sparse weight format (tflite).

    Raises SecateurError in one sentence: unknown target, missing runtime, an output that exists, an operation that the
    target lacks, a program that differs from Keras by more than `tolerance` of its outputs.
    """
    target = runtime_of(to)
    if target == KERAS:
        raise ModelError(f"{KERAS} is no target of an export; `model.save` writes it")
    tolerance = TOLERANCE if tolerance is None else tolerance
    ports = ports_of(model, data, length)
    if target in FIXED:
        ports = fixed(ports, batch or 1)
    elif batch is not None:
        raise ModelError(f"{target} takes any batch; leave out batch")
    feeds = list(feeds_of(ports, data))
    with new_folder(Path(output), overwrite=overwrite) as folder:
        info = write(model, target, folder, ports, feeds[0], sparse=sparse)
        try:
            parity = compare(model, runner.load(folder, ours={}), ports, feeds, tolerance)
        except runner.ArtefactError as error:
            raise ModelError(f"{model.name} was written for {target}, but does not run there: {error}") from error
        parity = replace(parity, made_up=data is None)
        info["parity"] = asdict(parity)
        write_json(folder / runner.MANIFEST, info)
    return Artefact(Path(output), target, info["bytes"], info["parameters"], info["zeros"], parity, None)


def write(
    model: keras.Model,
    target: str,
    folder: Path,
    ports: list[dict[str, Any]],
    feed: Mapping[str, Any],
    *,
    sparse: bool = False,
) -> dict[str, Any]:
    """Write the program and `artefact.json` into an existing folder; returns what the latter says."""
    example = _structured(model, feed)
    if target == KERAS:
        model.save(folder / files.NAME)
        file, loader = folder / files.NAME, KERAS
    else:
        file = folder / f"model{SUFFIX[target]}"
        write_program(model, file, target, example, sparse=sparse)
        file = file / "saved_model.pb" if file.is_dir() else file
        loader = "keras program"
    outputs = [f"output_{i}" for i in range(len(tree.flatten(run(model, example))))]
    matrices = [keras.ops.convert_to_numpy(w) for w in model.weights if len(w.shape) > 1]
    size = sum(w.size for w in matrices)
    info = {
        "format": runner.FORMAT,
        "target": target,
        "class": type(model).__name__,
        "graphs": {"model": {"files": [file.relative_to(folder).as_posix()], "inputs": ports, "outputs": outputs}},
        "loader": loader,
        "parameters": model.count_params(),
        "zeros": 1.0 - sum(int(np.count_nonzero(w)) for w in matrices) / size if size else 0.0,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "sha256": {
            path.relative_to(folder).as_posix(): runner.digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != runner.MANIFEST
        },
        "int8": False,
        "versions": {"keras": keras.__version__, "backend": keras.backend.backend(), **_versions(target)},
    }
    write_json(folder / runner.MANIFEST, info)
    return info


def load(folder: Path, graph: Mapping[str, Any], threads: int, options: Mapping[str, Any]) -> runner.Program:
    """Keras itself as a runtime: `predict_on_batch`, which TensorFlow compiles. No options are used."""
    set_threads(threads)
    model = files.load(folder / graph["files"][0])

    def call(feed: runner.Feed) -> dict[str, np.ndarray]:
        outputs = model.predict_on_batch(_structured(model, feed))
        return dict(zip(graph["outputs"], tree.flatten(outputs), strict=True))

    return call


def _versions(target: str) -> dict[str, str]:
    package = PACKAGES.get(target)
    return {package: version(package)} if package else {}


def runtime_of(name: str) -> str:
    """A runtime or target by the names that people use; ModelError for an unknown one or one that is not installed."""
    runtime = ALIASES.get(name, name)
    if runtime not in (KERAS, *TARGETS):
        raise ModelError(f"no runtime {name!r} for Keras models; there is {', '.join((KERAS, *TARGETS))}")
    if runtime in PACKAGES and importlib.util.find_spec(PACKAGES[runtime]) is None:
        raise ModelError(f"{PACKAGES[runtime]} is not installed; pip install {PACKAGES[runtime]}")
    return runtime


# -- inputs -----------------------------------------------------------------------------------------------------------


def ports_of(model: keras.Model, data: Any = None, length: int | None = None) -> list[dict[str, Any]]:
    """The inputs of the model in the form of `artefact.json`: the first dimension is the batch.

    Raises ModelError: a model without declared inputs and without data, a dimension that is open and no length.
    """
    check_model(model)
    inputs = tree.flatten(symbols(model, data))
    tables = [layer.input_dim for _, layer in layers(model) if isinstance(layer, kl.Embedding)]
    ports = []
    for number, tensor in enumerate(inputs):
        name, kind = tensor.name or f"input_{number}", keras.backend.standardize_dtype(tensor.dtype)
        if None in tensor.shape[1:] and length is None:
            raise ModelError(f"input {name} has an open length; pass --length")
        fill = "normal" if "float" in kind else 1 if kind == "bool" else "ids"
        shape = ["batch", *(length if n is None else n for n in tensor.shape[1:])]
        ports.append(
            {"name": name, "dtype": kind, "shape": shape, "fill": fill, "low": 1, "high": min(tables, default=2)}
        )
    if length is not None and all(None not in tensor.shape[1:] for tensor in inputs):
        raise ModelError(f"the inputs of {model.name} have fixed sizes, so there is no length {length}; leave it out")
    return ports


def fixed(ports: Iterable[Mapping[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Ports of one batch size."""
    return [{**port, "shape": [batch, *port["shape"][1:]]} for port in ports]


def feeds_of(ports: Sequence[Mapping[str, Any]], data: Any) -> Iterator[dict[str, np.ndarray]]:
    """Batches of inputs by name: of the data, in one size where the ports have one, else in several; or made up."""
    size = ports[0]["shape"][0]
    sizes = BATCHES if size == "batch" else (size,)
    if data is None:
        for seed, batch in enumerate(sizes):
            yield runner.made_up({"inputs": ports}, {"batch": batch}, seed)
        return
    arrays = dict(zip([port["name"] for port in ports], tree.flatten(data), strict=True))
    count, start = len(next(iter(arrays.values()))), 0
    for batch in itertools.cycle(sizes):
        if start >= count:
            return
        rows = np.arange(start, start + batch)
        rows = rows[rows < count] if size == "batch" else rows % count
        yield {port["name"]: arrays[port["name"]][rows].astype(port["dtype"]) for port in ports}
        start += batch


def _structured(model: keras.Model, feed: Mapping[str, Any]) -> Any:
    """Named arrays in the structure that the model takes."""
    values = list(feed.values())
    return tree.pack_sequence_as(symbols(model, values[0] if len(values) == 1 else values), values)


def compare(
    model: keras.Model,
    program: runner.Program,
    ports: Sequence[Mapping[str, Any]],
    feeds: Iterable[Mapping[str, np.ndarray]],
    tolerance: float,
) -> Parity:
    """Run both on every batch; ModelError when they differ by more than `tolerance` of the outputs."""
    comparison = Comparison("Keras", ModelError)
    for feed in feeds:
        expected = flat(run(model, _structured(model, feed)))
        shape = ", ".join("x".join(map(str, feed[port["name"]].shape)) for port in ports)
        try:
            got = list(program(feed).values())
        except Exception as error:  # every runtime breaks in its own way
            raise ModelError(f"the exported program does not run at shape {shape}: {runner.line(error)}") from error
        comparison.ran(shape, len(next(iter(feed.values()))))
        numbered = [{f"output_{i}": array for i, array in enumerate(arrays)} for arrays in (expected, got)]
        comparison.add(*numbered, ranked=["output_0"] if expected and expected[0].ndim == 2 else [])
    return comparison.parity(tolerance)


# -- bench ------------------------------------------------------------------------------------------------------------


def bench(
    sources: Sequence[Path | str],
    runtimes: Sequence[str] | None = None,
    *,
    batch: Sequence[int] = (8,),
    length: Sequence[int] = (64,),
    threads: int = 1,
    turns: int = 12,
    say: Say = lambda text: None,
) -> Bench:
    """Export `.keras` files to runtimes, check parity, and time them side by side; times are compared with the first's.

    batch, length: every pair is measured; length is for models whose inputs leave it open.
    threads: of each process, pinned. turns: rounds in which the models take turns.

    What a runtime refuses is a row with an `error`. Raises ModelError for files or names that are wrong.
    """
    chosen = list(dict.fromkeys(runtime_of(name) for name in (_installed() if runtimes is None else runtimes)))
    models = {name: files.load(path) for name, path in names_of(sources).items()}
    os.environ.setdefault("KERAS_BACKEND", keras.backend.backend())  # for the processes that time
    open_ended = any(None in tensor.shape[1:] for model in models.values() for tensor in model.inputs or [])
    lengths = length if open_ended else [_second(models)]

    def make(name: str, runtime: str, folder: Path, shape: Shape) -> Path:
        return _artefact(models[name], runtime, folder, shape[0], shape[1] if open_ended else None)

    def fixed(runtime: str) -> bool:
        return True  # the length goes into the artefact

    def result(timings: list[Timing]) -> Bench:
        return Bench(timings, words(timings, instead=""), threads, runner.machine())

    sizes: dict[str, Any] = {"threads": threads, "turns": turns}
    return in_turn(list(models), chosen, batch, lengths, make, fixed, result=result, say=say, **sizes)


def names_of(sources: Sequence[Path | str]) -> dict[str, Path]:
    """A short name for each file: `dense` for dense.keras, or its path where two names would be equal."""
    paths = [Path(source) for source in sources]
    names = short_names(paths)
    if len(set(names)) < len(names):
        raise ModelError(f"{names[0]} is named twice; pass each model once")
    return dict(zip(names, paths, strict=True))


def _installed() -> list[str]:
    backend = keras.backend.backend()
    installed = [n for n in DEFAULT if n not in PACKAGES or importlib.util.find_spec(PACKAGES[n]) is not None]
    return [n for n in installed if n == KERAS or backend in TARGETS[n]]


def _second(models: Mapping[str, keras.Model]) -> int:
    shape = next(iter(models.values())).inputs[0].shape
    return int(shape[1]) if len(shape) > 1 else 1


def _artefact(model: keras.Model, runtime: str, folder: Path, batch: int, length: int | None) -> Path:
    if runtime != KERAS:
        export(model, runtime, folder, batch=batch if runtime in FIXED else None, length=length)
        return folder
    ports = ports_of(model, length=length)
    folder.mkdir()
    write(model, KERAS, folder, ports, runner.made_up({"inputs": ports}, {"batch": batch}))
    return folder
