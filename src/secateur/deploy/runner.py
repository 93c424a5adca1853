"""Runs and times exported artefacts with nothing but numpy and their runtime, so that it can be copied to any device.

It is one file, however long, because export kits carry it (as `device.py`), and it imports nothing of secateur.

An artefact is a folder with `artefact.json`, which describes the inputs and outputs of the program. As a script, beside
a `kit.json` that `secateur bench --export-kit` wrote:

    python device.py [--threads N] [--output results.json] [--library secateur_onnx.so]

A description may come from a stranger. It says nothing that its rules here do not know, its programs are files inside
its folder, and it runs no Python code: only an artefact of this process's own (`ours`) may point at a model folder.

Each artefact runs in a process of its own with pinned threads; the processes take turns (A B A B ...). Start-up is the
time from the first line of this file to the first answer, with the import of the runtime.
"""

import time

BORN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import ctypes  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import urllib.error  # noqa: E402
import urllib.request  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

MANIFEST = "artefact.json"
KIT, RESULTS = "kit.json", "results.json"
OPERATORS = "secateur_onnx"
"""The library of secateur's operators for ONNX Runtime."""
FORMAT = 1
SAFE_LEVELS = 64
"""Largest whole number of an 8-bit weight that ONNX Runtime multiplies correctly on x86 without VNNI, where it adds two
products in 16 bits: 255 * 65 * 2 > 32767."""
START_LIMIT_S = 600
"""Seconds in which a process must open an artefact and answer once; the largest models take a few minutes."""
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
SECOND = ("full", "rest")
"""Graphs of a cascade that answer the rows which its graph "model" is not sure of: on all tokens, or going on from
where that one has stopped."""
JUDGED, ESCALATED = "logits", "escalated"
"""The output of a cascade whose confidence counts, and which rows it was too low for."""
Feed = Mapping[str, np.ndarray]
Program = Callable[[Feed], dict[str, np.ndarray]]
"""One graph on its runtime: named arrays -> named arrays. It ignores inputs that it does not know."""


class ArtefactError(Exception):
    """An artefact cannot be read or run; the message is one sentence."""


# -- descriptions -----------------------------------------------------------------------------------------------------

MOST_BYTES = 16 * 2**20
"""Largest description that is read; a decoder of a hundred layers has about 100 kB."""
MOST_NUMBERS = 2**26
"""Most numbers in one made-up input."""
DTYPES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)
SYMBOLS = ("batch", "length", "target", "past", "samples")
"""Names of dimensions that a program leaves open; `samples` are those of a sound."""


class Unfit(Exception):
    """A place in a description that is not as its rule says."""


@dataclass(frozen=True)
class Value:
    """The rule of a single value. words: what it must be."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Many:
    """The rule of a list, or of an object with any names (`named`), all of whose values have one rule."""

    rule: "Rule"
    named: bool = False
    most: int = 4096


@dataclass(frozen=True)
class Fields:
    """The rule of an object with these names and no others."""

    needed: "Mapping[str, Rule]"
    possible: "Mapping[str, Rule]"


Rule = Value | Many | Fields


def whole(low: int = 0, high: int = 2**53) -> Value:
    """A whole number within bounds."""
    return Value(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**1000 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 500 and value.isprintable()


TEXT = Value("a text of at most 500 printable characters", _is_text)
FLAG = Value("true or false", lambda value: type(value) is bool)
NUMBER = Value("a finite number", _is_number)
SHARE = Value("a share from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
NOTE = Value("a number, a text, true, false or null", lambda value: value is None or _is_plain(value))
SIZE = Value(
    f"a size: a number from 0 to {MOST_NUMBERS}, or one of {', '.join(SYMBOLS)}",
    lambda value: (type(value) is int and 0 <= value <= MOST_NUMBERS) or (type(value) is str and value in SYMBOLS),
)
FILL = Value(
    "'ids', 'normal', true, false or a number below 2^31",
    lambda value: (
        type(value) is bool
        or (_is_number(value) and abs(value) < 2**31)
        or (type(value) is str and value in ("ids", "normal"))
    ),
)
DTYPE = Value("a type of numbers", lambda value: type(value) is str and value in DTYPES)
DIGEST = Value("64 hexadecimal digits", lambda value: type(value) is str and bool(re.fullmatch("[0-9a-f]{64}", value)))
TOKEN = whole(-(2**31), 2**31)


def _is_plain(value: Any) -> bool:
    return type(value) is bool or _is_number(value) or _is_text(value)


PORT = Fields(
    {"name": TEXT, "dtype": DTYPE, "shape": Many(SIZE, most=16), "fill": FILL},
    {
        "low": whole(-(2**31)),
        "high": whole(-(2**31)),
        "at_most": Many(whole(1, MOST_NUMBERS), named=True, most=16),
        "usual": whole(0, MOST_NUMBERS),
    },
)
GRAPH = Fields(
    {"files": Many(TEXT), "inputs": Many(PORT), "outputs": Many(TEXT)},
    {"operators": Value(OPERATORS, lambda value: value == OPERATORS)},
)
PARITY = Fields(
    {"relative_error": NUMBER},
    {
        "worst_logit": NUMBER,
        "agreement": NOTE,
        "examples": whole(),
        "shapes": Many(TEXT, most=100_000),
        "tolerance": NUMBER,
        "made_up": FLAG,
        "tokens": whole(),
        "equal": FLAG,
    },
)
GENERATION = Fields(
    {
        "start": Value("a token or null", lambda value: value is None or TOKEN.holds(value)),
        "end": Many(TOKEN),
        "pad": TOKEN,
    },
    {"parity": PARITY},
)
CASCADE = Fields(
    {"threshold": NUMBER, "escalated": SHARE},
    {"agreement": SHARE, "rows": whole(), "wanted": SHARE, "sure": SHARE},
)
DESCRIPTION = Fields(
    {"format": whole(), "target": TEXT, "graphs": Many(GRAPH, named=True, most=16)},
    {
        "loader": TEXT,
        "source": Value("a path", lambda value: type(value) is str and "\0" not in value),
        "every_token": FLAG,
        "class": TEXT,
        "parameters": whole(),
        "zeros": SHARE,
        "bytes": whole(),
        "sizes": Many(whole(), named=True),
        "sha256": Many(DIGEST, named=True),
        "int8": FLAG,
        "levels": whole(0, 255),
        "versions": Many(TEXT, named=True),
        "sparse": Many(NOTE, named=True),
        "gguf": Many(NOTE, named=True),
        "parity": PARITY,
        "generation": GENERATION,
        "cascade": CASCADE,
    },
)
"""What `artefact.json` may say."""
KIT_DESCRIPTION = Fields(
    {
        "id": TEXT,
        "batch": Many(whole(1)),
        "length": Many(whole(1)),
        "threads": whole(1),
        "turns": whole(1),
        "runtimes": Many(Many(TEXT, named=True), named=True),
        "files": Many(DIGEST, named=True, most=100_000),
    },
    {
        "library": Value("a hash or null", lambda value: value is None or DIGEST.holds(value)),
        "sizes": Many(Many(Many(NOTE, named=True), named=True), named=True),
    },
)
"""What `kit.json` may say."""


def conform(value: Any, rule: Rule, place: str = "it") -> None:
    """Raise Unfit for the first place of a value that is not as its rule says."""
    if isinstance(rule, Value):
        if not rule.holds(value):
            raise Unfit(f"{place} is {_shown(value)}, not {rule.words}")
    elif isinstance(rule, Fields):
        _conform_fields(value, rule, place)
    else:
        if type(value) is not (dict if rule.named else list):
            raise Unfit(f"{place} is {_shown(value)}, not {'an object' if rule.named else 'a list'}")
        if len(value) > rule.most:
            raise Unfit(f"{place} has {len(value)} entries, more than {rule.most}")
        for key in value if rule.named else range(len(value)):
            if rule.named and not TEXT.holds(key):
                raise Unfit(f"{place} has the name {_shown(key)}, not {TEXT.words}")
            conform(value[key], rule.rule, f"{place}.{key}".removeprefix("it."))


def _conform_fields(value: Any, rule: Fields, place: str) -> None:
    if type(value) is not dict:
        raise Unfit(f"{place} is {_shown(value)}, not an object")
    for key in rule.needed:
        if key not in value:
            raise Unfit(f"{place} lacks {key!r}")
    known = {**rule.needed, **rule.possible}
    for key in value:
        if key not in known:
            raise Unfit(f"{place} has {_shown(key)}, which this version does not know")
        conform(value[key], known[key], f"{place}.{key}".removeprefix("it."))


def printable(text: str) -> str:
    """Text as a terminal can show it: characters that it would obey or hide become escapes such as `\\x1b`."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def agree(info: Mapping[str, Any]) -> None:
    """Raise Unfit where parts of a description, each as its rule says, contradict each other."""
    for name, graph in info["graphs"].items():
        place = f"graphs.{name}"
        for names in ([port["name"] for port in graph["inputs"]], graph["outputs"], graph["files"]):
            twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
            if twice is not None:
                raise Unfit(f"{place} names {twice!r} twice")
        for port in graph["inputs"]:
            _check_port(port, f"{place}, input {port['name']}")
    if "cascade" in info:
        _check_cascade(info)
    if "generation" in info:
        for name in ("decode", "prefill") if "encoder" in info["graphs"] else ("decode",):
            if name not in info["graphs"]:
                raise Unfit(f"it generates, but has no graph {name!r}")


def _check_cascade(info: Mapping[str, Any]) -> None:
    if "model" not in info["graphs"] or sum(name in info["graphs"] for name in SECOND) != 1:
        raise Unfit(f"it is a cascade, but its graphs are not 'model' and one of {', '.join(map(repr, SECOND))}")
    for name, graph in info["graphs"].items():
        if JUDGED not in graph["outputs"]:
            raise Unfit(f"it is a cascade, but graphs.{name} does not give {JUDGED!r}")


def _check_port(port: Mapping[str, Any], place: str) -> None:
    shape = port["shape"]
    if math.prod(n for n in shape if isinstance(n, int)) > MOST_NUMBERS:
        raise Unfit(f"{place} is absurdly large: {' x '.join(map(str, shape))}")
    low, high = port.get("low", 0), port.get("high", 1)
    if "samples" in shape and not port.get("usual"):
        raise Unfit(f"{place} is a sound, and does not say how many samples are usual")
    if port["fill"] == "ids" and low >= high:
        raise Unfit(f"{place}: there are no numbers from {low} to below {high}")
    symbols = {str(i) for i, n in enumerate(shape) if isinstance(n, str)}
    wrong = next((dim for dim in port.get("at_most", ()) if dim not in symbols), None)
    if wrong is not None:
        raise Unfit(f"{place}: at_most bounds dimension {wrong!r}, which is not open")


def read(folder: Path | str) -> dict[str, Any]:
    """The description of an artefact; ArtefactError when the folder has none, or a damaged one."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no exported model: it has no {MANIFEST}")
    try:
        info = _parse(path)
        if type(info) is dict and (type(info.get("format", FORMAT)) is not int or info.get("format", FORMAT) != FORMAT):
            raise ArtefactError(f"{path} has format {_shown(info['format'])}; this version reads {FORMAT}")
        conform(info, DESCRIPTION)
        agree(info)
        _check_loader(folder, info)
        for name in _files(info):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise ArtefactError(f"{path} names {name}, which lies outside {folder}; do not use this artefact")
            if not (folder / name).is_file():
                raise ArtefactError(f"{folder} is no whole artefact: {name} is missing; export it again")
        for name, size in info.get("sizes", {}).items():
            actual = (folder / name).stat().st_size
            if actual != size:
                raise ArtefactError(f"{folder} is damaged: {name} has {actual} bytes, not {size}; export it again")
    except Unfit as error:
        raise ArtefactError(f"{path} is damaged: {error}; export it again") from None
    except (OSError, ValueError, RuntimeError) as error:  # among them too deep a nesting, and links in a circle
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {line(error)}); export it again") from None
    return info


def _parse(path: Path) -> Any:
    """The value in a JSON file, which holds no key twice and no number that JSON does not have."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise Unfit(f"it has {size} bytes, which is more than the {MOST_BYTES} that are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise Unfit(f"it has the key {_shown(key)} twice")
            found[key] = value
        return found

    def constant(name: str) -> None:
        raise Unfit(f"{name} is no number of JSON")

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=constant)


def _files(info: Mapping[str, Any]) -> list[str]:
    """Every file that a description names."""
    named = [name for graph in info["graphs"].values() for name in graph["files"]]
    return list(dict.fromkeys([*named, *info.get("sizes", {}), *info.get("sha256", {})]))


def _check_loader(folder: Path, info: Mapping[str, Any]) -> None:
    """ArtefactError for a loader that is unknown or of another target, and for a program that is no file for it."""
    target, key = info["target"], info.get("loader", info["target"])
    if key not in LOADERS:
        raise ArtefactError(f"{folder} is for {key!r}; this version runs {', '.join(LOADERS)}; export it again")
    own = [name for name, loader in LOADERS.items() if target in loader.endings]
    if not own:
        raise ArtefactError(f"{folder} is for {target!r}, which this version does not know; export it again")
    if key not in own:
        article = "an" if target[0] in "aeiou" else "a"
        raise ArtefactError(
            f"{folder} is damaged: {article} {target} artefact is loaded by {' or '.join(own)}, not by {key!r}; do not "
            "use this artefact"
        )
    ending = LOADERS[key].endings[target]
    if (ending == SOURCE) != ("source" in info):
        raise Unfit(f"it is for {target} and names {'a' if 'source' in info else 'no'} source")
    for name, graph in info["graphs"].items():
        if ending != SOURCE and not graph["files"]:
            raise Unfit(f"graphs.{name} names no program")
        if ending != SOURCE and Path(graph["files"][0]).suffix != ending:
            raise Unfit(f"{graph['files'][0]} is no {ending} file, which a program for {target} is")
        if "operators" in graph and key != "onnx":
            raise Unfit(f"graphs.{name} has operators, which only a program for onnx has")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def verify_files(folder: Path | str) -> int:
    """How many files of an artefact have the SHA-256 that its description gives.

    Raises ArtefactError for a file that has changed, and for an artefact without hashes.
    """
    folder, info = Path(folder), read(folder)
    if not info.get("sha256"):
        raise ArtefactError(f"{folder} was exported by a version that wrote no hashes; export it again to check them")
    for name in [n for graph in info["graphs"].values() for n in graph["files"] if n not in info["sha256"]]:
        raise ArtefactError(f"{folder} has no hash of {name}; export it again")
    for name, expected in info["sha256"].items():
        if digest(folder / name) != expected:
            raise ArtefactError(f"{folder} is damaged: {name} is not the file that was exported; export it again")
    return len(info["sha256"])


# -- runtimes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A program on its runtime.

    call: inputs in order -> outputs in order.
    takes: the program's own names of its inputs, in that order; empty where an artefact does not use them.
    gives: the same of its outputs.
    """

    call: Callable[[Sequence[Any]], list[np.ndarray]]
    takes: Sequence[str] = ()
    gives: Sequence[str] = ()


def open_onnx(path: Path, threads: int, library: str | None = None) -> Opened:
    """An `.onnx` file on ONNX Runtime, CPU, with sequential execution. library: of custom operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    takes = [port.name for port in session.get_inputs()]
    gives = [port.name for port in session.get_outputs()]

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        return list(session.run(gives, dict(zip(takes, map(np.asarray, values), strict=True))))

    return Opened(call, takes, gives)


def open_openvino(path: Path, threads: int) -> Opened:
    """An `.xml` file on OpenVINO, CPU, in float32 (by default it computes in bfloat16 where the processor has it)."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    request = model.create_infer_request()
    takes, gives = ([port.any_name if port.names else "" for port in ports] for ports in (model.inputs, model.outputs))

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        outputs = request.infer({i: np.asarray(value) for i, value in enumerate(values)})
        return [outputs[port] for port in model.outputs]

    return Opened(call, takes, gives)


def open_executorch(path: Path, threads: int) -> Opened:
    """A `.pte` file on ExecuTorch's portable runtime with XNNPACK, whose Python API takes torch tensors."""
    import torch
    from executorch.runtime import Runtime

    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from executorch.extension.pybindings import portable_lib

        portable_lib._threadpool_reset(threads)
    method = Runtime.get().load_program(path).load_method("forward")

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        outputs = method.execute([torch.from_numpy(np.ascontiguousarray(value)) for value in values])
        return [tensor.numpy().copy() for tensor in outputs]

    return Opened(call)


def _interpreter(path: Path, threads: int) -> Any:
    """LiteRT with XNNPACK, or the copy of it that TensorFlow brings."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as missing:
        try:
            from tensorflow.lite.python.interpreter import Interpreter
        except ImportError:
            raise missing from None
    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


def open_litert(path: Path, threads: int) -> Opened:
    """A `.tflite` file, whose inputs and outputs are its tensors in order."""
    interpreter = _interpreter(path, threads)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        for detail, value in zip(inputs, values, strict=True):
            interpreter.set_tensor(detail["index"], np.asarray(value, dtype=detail["dtype"]))
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    return Opened(call)


def open_litert_torch(path: Path, threads: int) -> Opened:
    """A `.tflite` file of litert_torch, whose signature has inputs args_0, args_1 ... and outputs output_0 ..."""
    signature = _interpreter(path, threads).get_signature_runner()
    types = {int(name.removeprefix("args_")): detail["dtype"] for name, detail in signature.get_input_details().items()}

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        outputs = signature(**{f"args_{i}": np.asarray(values[i], dtype) for i, dtype in types.items()})
        return [outputs[f"output_{i}"] for i in range(len(outputs))]

    return Opened(call)


def open_saved_model(path: Path, threads: int) -> Opened:
    """A SavedModel folder (or the file in it) that Keras exported, on TensorFlow."""
    import tensorflow as tf

    model = tf.saved_model.load(str(path.parent if path.suffix else path))
    signature = model.serve.concrete_functions[0].structured_input_signature[0]

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        inputs = tf.nest.pack_sequence_as(signature, [tf.convert_to_tensor(value) for value in values])
        return [np.asarray(x) for x in tf.nest.flatten(model.serve(*inputs))]

    return Opened(call)


Ask = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""(path, request) -> answer of a server of llama.cpp, as its HTTP API documents them."""
NEXT = "next_token"
"""The output of a `.gguf` program: llama.cpp's choice after each row of tokens."""


def open_llama_cpp(path: Path, threads: int, context: int, *, exact: bool = False) -> tuple[str, Ask]:
    """A `.gguf` file on llama.cpp, whose server listens on this machine only: its address, and what asks it.

    context: most tokens of a text, its continuation included. exact: attention in float32, not float16.
    """
    import xllamacpp

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":  # llama.cpp would say so on the standard error
            raise ArtefactError(f"{path} is no GGUF file; export it again")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.fit_params, settings.warmup = context, 1, False, False
    settings.n_batch = settings.n_ubatch = min(context, 512)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_threads_http = 1
    settings.ui = False
    if exact:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = (
            xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )  # it rounds to float16
    server = xllamacpp.Server(settings)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(place: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return asked(direct, server.listening_address, place, request)

    return server.listening_address, ask


def asked(opener: Any, address: str, place: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of llama.cpp's server at an address; ArtefactError with its own words where it refuses."""
    body = json.dumps(dict(request)).encode()
    message = urllib.request.Request(address + place, body, {"Content-Type": "application/json"})
    try:
        with opener.open(message, timeout=START_LIMIT_S) as answer:
            found: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise ArtefactError(f"llama.cpp refuses: {line(ValueError(error.read().decode(errors='replace')))}") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"llama.cpp does not answer ({type(error).__name__}: {line(error)})") from None
    return found


OPENERS: dict[str, Callable[[Path, int], Opened]] = {
    ".tflite": open_litert,
    ".onnx": open_onnx,
    ".xml": open_openvino,
    ".pb": open_saved_model,
    "": open_saved_model,
}
"""What opens a program that Keras wrote, by the ending of its file; a folder is a SavedModel."""


# -- loaders: (folder, graph of the description, threads) -> program ---------------------------------------------------


def by_name(opened: Opened) -> Program:
    """A program whose own names are those of the artefact."""
    return lambda feed: dict(zip(opened.gives, opened.call([feed[name] for name in opened.takes]), strict=True))


def by_position(opened: Opened, graph: Mapping[str, Any]) -> Program:
    """A program that takes and gives, in order, what the artefact names."""
    takes = [port["name"] for port in graph["inputs"]]
    return lambda feed: dict(zip(graph["outputs"], opened.call([feed[name] for name in takes]), strict=True))


def load_onnx(folder: Path, graph: Mapping[str, Any], threads: int, library: str | None = None) -> Program:
    """On ONNX Runtime. library: of secateur's operators, for a program that uses them."""
    return by_name(open_onnx(folder / graph["files"][0], threads, library))


def load_openvino(folder: Path, graph: Mapping[str, Any], threads: int) -> Program:
    """On OpenVINO."""
    return by_name(open_openvino(folder / graph["files"][0], threads))


def load_executorch(folder: Path, graph: Mapping[str, Any], threads: int) -> Program:
    """On ExecuTorch; tensors that the program changes in place come before its outputs."""
    opened, count = open_executorch(folder / graph["files"][0], threads), len(graph["outputs"])
    return by_position(Opened(lambda values: opened.call(values)[-count:]), graph)


def load_litert(folder: Path, graph: Mapping[str, Any], threads: int) -> Program:
    """On LiteRT, written by litert_torch; one fixed shape."""
    return by_position(open_litert_torch(folder / graph["files"][0], threads), graph)


def load_gguf(folder: Path, graph: Mapping[str, Any], threads: int) -> Program:
    """On llama.cpp: reads each row of `input_ids` and chooses one token. It starts at the first call, with memory for
    the keys and values of that many tokens."""
    path, opened = folder / graph["files"][0], dict[int, Ask]()

    def run(feed: Feed) -> dict[str, np.ndarray]:
        ids = feed["input_ids"]
        context = max(256, -(-(ids.shape[1] + 1) // 256) * 256)
        if context not in opened:
            opened.clear()
            opened[context] = open_llama_cpp(path, threads, context)[1]
        choice = {"n_predict": 1, "temperature": 0, "cache_prompt": False, "return_tokens": True, "ignore_eos": True}
        rows = [opened[context]("/completion", {**choice, "prompt": row.tolist()})["tokens"] for row in ids]
        return {NEXT: np.asarray(rows, np.int64)[:, 0]}

    return run


def load_keras_program(folder: Path, graph: Mapping[str, Any], threads: int) -> Program:
    """A program that Keras wrote, on its runtime; only the order of its inputs and outputs is that of the model."""
    path = folder / graph["files"][0]
    return by_position(OPENERS[path.suffix](path, threads), graph)


SOURCE = "source"


@dataclass(frozen=True)
class Loader:
    """What loads an artefact.

    load: the function, or its module and name; then it also takes the options that the caller of `load` gives.
    endings: target -> the ending of its program; `SOURCE` where the description points at a model folder.
    ours: targets whose artefacts can do what they like to the user's files, so that only those of our own are loaded.
    """

    load: Callable[..., Program] | str
    endings: Mapping[str, str]
    ours: Sequence[str] = ()


KERAS_ENDINGS = {"litert": ".tflite", "tflite": ".tflite", "onnx": ".onnx", "openvino": ".xml", "saved_model": ".pb"}
LOADERS = {
    "onnx": Loader(load_onnx, {"onnx": ".onnx"}),
    "openvino": Loader(load_openvino, {"openvino": ".xml"}),
    "executorch": Loader(load_executorch, {"executorch": ".pte"}),
    "litert": Loader(load_litert, {"litert": ".tflite"}),
    "gguf": Loader(load_gguf, {"gguf": ".gguf"}),
    "torch": Loader("secateur.deploy.jobs.torch_runtimes:load", {"torch": SOURCE}, ["torch"]),
    "secateur": Loader("secateur.deploy.jobs.torch_runtimes:load_sparse", {"secateur": SOURCE}, ["secateur"]),
    "keras": Loader("secateur.deploy.jobs.keras_jobs:load", {"keras": ".keras"}, ["keras"]),
    "keras program": Loader(load_keras_program, KERAS_ENDINGS, ["saved_model"]),
}
"""What loads an artefact, by the `loader` of its description or else by its target. A description, which may come from
a stranger, can name nothing else."""


def operators(library: str | None) -> str:
    """The library of secateur's operators that the caller names. One that lies beside a program is never loaded."""
    if library is None:
        raise ArtefactError("the program runs on secateur's kernels: install secateur, which brings their library")
    return library


def load(
    folder: Path | str,
    name: str = "model",
    threads: int = 1,
    library: str | None = None,
    *,
    ours: Mapping[str, Any] | None = None,
) -> Program:
    """One graph of an artefact on its runtime; ArtefactError when it cannot be loaded.

    library: where secateur's operators for ONNX Runtime are installed.
    ours: for an artefact that the caller itself made, whatever it points at or does: options for opening the model
    folder (`trust_remote_code` among them, which no file can switch on), else {}. None: it may be a stranger's.
    """
    folder, info = Path(folder), read(folder)
    if name not in info["graphs"]:
        raise ArtefactError(f"{folder} has no graph {name!r}; it has {', '.join(info['graphs'])}")
    graph, target = info["graphs"][name], info["target"]
    loader = LOADERS[info.get("loader", target)]
    if target in loader.ours and ours is None:
        does = "points at a model folder" if "source" in info else "may read and write your files when it runs"
        raise ArtefactError(
            f"{folder} is for {target} and {does}: bench loads such artefacts only when it made them itself; pass "
            "ours={} if you made it"
        )
    if overflows(info):
        warnings.warn(
            f"{folder} was exported with 8-bit weights where ONNX Runtime has VNNI for them; without it, as here, its "
            "products overflow and answers are wrong: export it on a machine like this one",
            stacklevel=2,
        )
    try:
        opens = _function(loader.load)
        if isinstance(loader.load, str):
            opens = functools.partial(opens, options=dict(ours or {}))
        if "operators" in graph:
            opens = functools.partial(opens, library=operators(library))
        program = opens(folder, graph, threads)
    except ArtefactError:
        raise
    except ImportError as error:
        raise ArtefactError(f"{error.name} is not installed, which runs {target} artefacts") from error
    except Exception as error:  # every runtime breaks in its own way
        raise ArtefactError(f"{folder} is damaged or not for this runtime ({target}): {line(error)}") from None
    return checked(program, graph, target)


def overflows(info: Mapping[str, Any]) -> bool:
    """Whether a program holds weights of a full 8 bits that this processor cannot multiply in ONNX Runtime; False where
    the processor is unknown."""
    if info.get("levels", 0) <= SAFE_LEVELS:
        return False
    flags = processor_flags()
    return bool(flags) and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def processor_flags() -> set[str]:
    """The instruction sets of an x86 processor, on Linux; empty elsewhere."""
    return {*processor_says("flags").split()}


def processor_says(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; '' where there is none."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith(field):
                return entry.partition(":")[2].strip()
    return ""


def _function(entry: Callable[..., Program] | str) -> Callable[..., Program]:
    """A function, or what the module and name in a string stand for."""
    if callable(entry):
        return entry
    module, _, function = entry.partition(":")
    loaded: Callable[..., Program] = getattr(importlib.import_module(module), function)
    return loaded


def checked(program: Program, graph: Mapping[str, Any], target: str) -> Program:
    """The program, which checks its inputs first: a wrong shape gives a sentence, not what the runtime prints."""

    def run(feed: Feed) -> dict[str, np.ndarray]:
        for port in graph["inputs"]:
            if port["name"] not in feed:
                raise ArtefactError(f"the program takes {port['name']}, which is not among {', '.join(feed)}")
            shape = feed[port["name"]].shape
            fits = len(shape) == len(port["shape"]) and all(
                isinstance(size, str) or actual == size for actual, size in zip(shape, port["shape"], strict=True)
            )
            at_most = port.get("at_most", {})
            if not fits or any(shape[int(dim)] > most for dim, most in at_most.items()):
                sizes = " x ".join(str(n) for n in port["shape"])
                bound = f", at most {' x '.join(map(str, at_most.values()))}" if at_most else ""
                raise ArtefactError(
                    f"{port['name']} has shape {' x '.join(map(str, shape))}, but this {target} program takes "
                    f"{sizes}{bound}; export it for that shape"
                )
        try:
            return program(feed)
        except ArtefactError:
            raise
        except Exception as error:  # every runtime breaks in its own way
            said = f"{type(error).__name__}: {line(error)}"
            raise ArtefactError(f"this {target} program does not run on these inputs ({said})") from error

    return run


def line(error: BaseException) -> str:
    """The message of an exception, on one line of at most 240 characters."""
    text = re.sub(r"Exception from [^ ]+:\d+:?", "", str(error))  # a line in OpenVINO's sources
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    return text if len(text) < 240 else text[:237] + "..."


# -- cascades ---------------------------------------------------------------------------------------------------------


def cascade(folder: Path | str, inputs: Feed, threads: int = 1, library: str | None = None) -> dict[str, np.ndarray]:
    """What `open_cascade` gives on one batch; the programs are loaded at each call."""
    return open_cascade(folder, threads, library)(inputs)


def open_cascade(folder: Path | str, threads: int = 1, library: str | None = None) -> Program:
    """An artefact of two graphs as one program: "model" runs on all rows of a batch, the second graph on those whose
    confidence, the largest softmax probability, is below the threshold. Besides the outputs, `escalated` says which.

    Raises ArtefactError for an artefact that is no cascade, or that cannot be loaded.
    """
    info = read(folder)
    if "cascade" not in info:
        raise ArtefactError(f"{folder} is no cascade; export it again with a model that prunes tokens (--cascade)")
    threshold, name = info["cascade"]["threshold"], second_graph(info)
    first, second = (load(folder, graph, threads, library) for graph in ("model", name))
    common = [output for output in info["graphs"][name]["outputs"] if output in info["graphs"]["model"]["outputs"]]

    def run(feed: Feed) -> dict[str, np.ndarray]:
        outputs = first(feed)
        unsure = confidence(outputs[JUDGED]) < threshold
        answers = {output: outputs[output] for output in common}
        if unsure.any():
            full = second(_rows({**feed, **outputs}, unsure))
            for output in common:
                answers[output] = answers[output].copy()
                answers[output][unsure] = full[output]
        return {**answers, ESCALATED: unsure}

    return run


def second_graph(info: Mapping[str, Any]) -> str:
    """The name of a cascade's graph that answers the rows which the first one is not sure of."""
    return next(name for name in SECOND if name in info["graphs"])


def confidence(logits: np.ndarray) -> np.ndarray:
    """(rows,) the largest softmax probability of (rows, classes), in float64: in float32 sure rows all have 1."""
    wide = logits.astype(np.float64)
    total: np.ndarray = np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)
    return 1 / total


def _rows(feed: Feed, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen rows of a batch; what has another number of rows is the same for all."""
    return {name: value[chosen] if len(value) == len(chosen) else value for name, value in feed.items()}


# -- made-up inputs ---------------------------------------------------------------------------------------------------


def made_up(graph: Mapping[str, Any], sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a graph; `sizes` gives its symbolic dimensions, except for `samples`, which may be as usual.

    Raises ArtefactError for an input of more than `MOST_NUMBERS` numbers.
    """
    rng = np.random.default_rng(seed)
    feed = {}
    for port in graph["inputs"]:
        usual = {"samples": port.get("usual", 0)}
        shape = [n if isinstance(n, int) else {**usual, **sizes}[n] for n in port["shape"]]
        if math.prod(shape) > MOST_NUMBERS:
            raise ArtefactError(f"{port['name']} of {' x '.join(map(str, shape))} has more than {MOST_NUMBERS} numbers")
        value: Any
        if port["fill"] == "ids":
            value = rng.integers(port.get("low", 0), port.get("high", 1), shape)
        elif port["fill"] == "normal":
            value = rng.standard_normal(shape)
        else:
            value = np.full(shape, port["fill"])
        feed[port["name"]] = value.astype(port["dtype"])
    return feed


def takes_tokens(info: Mapping[str, Any]) -> bool:
    """Whether an artefact takes tokens, so that its calls have a length."""
    ports = [port for graph in info["graphs"].values() for port in graph["inputs"]]
    return any(port["fill"] == "ids" and len(port["shape"]) == 2 for port in ports)


def sizes_for(graph: Mapping[str, Any], batch: int, length: int) -> dict[str, int]:
    """Values of the symbolic dimensions of a graph: a decoder's text has the encoder's length, its cache is empty."""
    return {"batch": batch, "length": length, "target": length, "past": 0}


# -- timing: a process for each artefact ------------------------------------------------------------------------------


def serve(
    folder: str,
    batch: int,
    length: int,
    threads: int,
    library: str | None = None,
    ours: Mapping[str, Any] | None = None,
) -> None:
    """Load an artefact, answer once, then time on request: one JSON object a line on the real standard output."""
    pin(threads)
    end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        info, parts = read(folder), []
        for name, share in shares(info).items():
            program, graph = load(folder, name, threads, library, ours=ours), info["graphs"][name]
            feed = made_up(graph, sizes_for(graph, batch, length))
            program(feed)
            parts.append((program, feed, share))
    except Exception as error:  # the process that started this one waits for an answer
        answer({"error": str(error) if isinstance(error, ArtefactError) else f"{type(error).__name__}: {line(error)}"})
        return
    answer({"startup_s": time.perf_counter() - BORN})
    for request in sys.stdin:
        runs = json.loads(request)["runs"]
        if not runs:
            answer({"peak_bytes": peak_bytes()})
            return
        seconds = []
        for _ in range(runs + 1):  # the first run finds data of the other artefact in the caches
            spent = 0.0
            for program, feed, share in parts:
                start = time.perf_counter()
                program(feed)
                spent += share * (time.perf_counter() - start)
            seconds.append(spent)
        answer({"seconds": seconds[1:]})


def serve_llama_cpp(path: Path, threads: int, context: int, *, exact: bool) -> None:
    """Hold a `.gguf` file open until the standard input ends: one JSON object with the server's address, or an error.

    llama.cpp ends the process where it finds a mistake, so it gets one of its own.
    """
    end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opened = None  # the server ends with what asks it
    try:
        opened = open_llama_cpp(path, threads, context, exact=exact)
        answer = {"address": opened[0]}
    except Exception as error:  # the process that started this one waits for an answer
        answer = {"error": str(error) if isinstance(error, ArtefactError) else f"{type(error).__name__}: {line(error)}"}
    print(json.dumps(answer), file=out, flush=True)
    if opened is not None:
        sys.stdin.read()


def shares(info: Mapping[str, Any]) -> dict[str, float]:
    """How often each graph runs in a call that is timed. Made-up inputs say nothing of how sure a cascade is, so its
    second graph counts by the share of rows that needed it when it was made."""
    return {"model": 1.0, **({second_graph(info): info["cascade"]["escalated"]} if "cascade" in info else {})}


def end_with_parent() -> None:
    """Have Linux end this process together with its parent: a stopped process cannot notice that the parent ended."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)


def peak_bytes() -> int:
    """The largest resident memory that this process has had, or 0 where the system does not report it."""
    try:
        for entry in Path("/proc/self/status").read_text().splitlines():
            if entry.startswith("VmHWM:"):
                return int(entry.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Worker:
    """A process that holds one artefact ready to be timed. It is stopped between requests, because the threads of some
    runtimes go on spinning after a run.

    library, ours: as `load` takes them; they travel on the command line, so that no file can set them.
    Raises ArtefactError when the artefact cannot run, and when it is not ready after `START_LIMIT_S`: that ends it.
    """

    def __init__(
        self,
        folder: Path | str,
        batch: int,
        length: int,
        threads: int,
        library: str | None = None,
        *,
        ours: Mapping[str, Any] | None = None,
    ) -> None:
        environment = {**os.environ, **dict.fromkeys(POOLS, str(threads))}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p and Path(p) != Path(__file__).parent)
        command = [sys.executable, "-P", __file__, "--serve", str(folder)]
        command += ["--batch", str(batch), "--length", str(length), "--threads", str(threads)]
        command += ["--library", library] if library is not None else []
        command += ["--ours", json.dumps(dict(ours))] if ours is not None else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._requests: Any = self._process.stdin
        self._answers: Any = self._process.stdout
        self.peak_bytes = 0
        self.startup_s = self._first_answer(folder)["startup_s"]
        self._send("SIGSTOP")

    def time(self, runs: int) -> list[float]:
        """Seconds of each of that many runs."""
        return self._ask(runs)["seconds"]

    def close(self) -> None:
        """End the process; `peak_bytes` is known afterwards."""
        if self._process.poll() is None:
            with contextlib.suppress(ArtefactError, OSError):
                self.peak_bytes = self._ask(0)["peak_bytes"]
        self.stop()

    def stop(self) -> None:
        """End the process without a last request."""
        self._process.kill()
        self._process.wait()

    def _first_answer(self, folder: Path | str) -> dict[str, Any]:
        """What the process says once it is ready; a timer kills it where it hangs, which ends the wait for its line."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(START_LIMIT_S, end)
        timer.daemon = True
        timer.start()
        try:
            return self._answer()
        except ArtefactError:
            if not late.is_set():
                raise
            raise ArtefactError(
                f"{folder} was not ready after {START_LIMIT_S} s, so its process was ended; export it again, or use a "
                "smaller model or a faster machine"
            ) from None
        finally:
            timer.cancel()

    def _ask(self, runs: int) -> dict[str, Any]:
        self._send("SIGCONT")
        self._requests.write(json.dumps({"runs": runs}) + "\n")
        self._requests.flush()
        answer = self._answer()
        self._send("SIGSTOP")
        return answer

    def _send(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            self._process.send_signal(getattr(signal, name))

    def _answer(self) -> dict[str, Any]:
        text = self._answers.readline()
        answer = json.loads(text) if text else {"error": "the process that ran the artefact died; is there memory?"}
        if "error" in answer:
            self.stop()
            raise ArtefactError(answer["error"])
        return answer


def pin(threads: int) -> None:
    """Keep this process on as many cores as it has threads, where the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def measure(
    artefacts: Mapping[str, Path | str],
    batch: int,
    length: int,
    threads: int,
    turns: int = 12,
    runs: int = 3,
    *,
    library: str | None = None,
    ours: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time artefacts in turn at one shape: name -> median and quartiles in ms, start-up in s, peak memory in bytes.

    library: where secateur's operators are installed. ours: of the artefacts that the caller made, by name, what `load`
    takes. An artefact that cannot run has only an `error`, one sentence.
    """
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, folder in artefacts.items():
            try:
                workers[name] = Worker(folder, batch, length, threads, library, ours=(ours or {}).get(name))
                stack.callback(workers[name].stop)
            except ArtefactError as error:
                rows[name] = {"error": str(error)}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(turns):
            for name, worker in workers.items():
                seconds[name] += worker.time(runs)
        for name, worker in workers.items():
            worker.close()
            low, middle, high = statistics.quantiles([1e3 * s for s in seconds[name]], n=4)
            rows[name] = {
                "median_ms": middle,
                "low_ms": low,
                "high_ms": high,
                "startup_s": worker.startup_s,
                "peak_bytes": worker.peak_bytes,
            }
    return {name: rows[name] for name in artefacts}


def machine() -> dict[str, Any]:
    """The machine, on which results depend as on the artefact."""
    return {
        "processor": processor_says("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def run_kit(
    folder: Path, threads: int | None, say: Callable[[str], None], library: str | None = None
) -> dict[str, Any]:
    """Time everything that `kit.json` lists, at its shapes, artefacts of one runtime in turn.

    library: of secateur's operators; by default that of the kit.

    Raises ArtefactError, before anything is opened, for a kit that is not as it was written.
    """
    kit = read_kit(folder)
    library = library or kit_library(folder, kit)
    threads = threads or kit["threads"]
    rows: list[dict[str, Any]] = []
    for runtime, artefacts in kit["runtimes"].items():
        for batch in kit["batch"]:
            folders = {name: folder / place for name, place in artefacts.items()}
            have_length = any(takes_tokens(read(place)) for place in folders.values())
            for length in kit["length"] if have_length else [0]:
                say(f"{runtime}, {batch} x {length} ..." if length else f"{runtime}, {batch} ...")
                for name, row in measure(folders, batch, length, threads, kit["turns"], library=library).items():
                    rows.append({"model": name, "runtime": runtime, "batch": batch, "length": length, **row})
    return {"format": FORMAT, "kit": kit["id"], "threads": threads, "machine": machine(), "rows": rows}


def read_kit(folder: Path) -> dict[str, Any]:
    """What `kit.json` says, after every file of the artefacts was compared with its hash there.

    Raises ArtefactError for a damaged `kit.json`, and for a file that is another one, is missing or has no hash.
    """
    path = folder / KIT
    try:
        kit: dict[str, Any] = _parse(path)
        conform(kit, KIT_DESCRIPTION)
    except Unfit as error:
        raise ArtefactError(f"{path} is damaged: {error}; copy the kit again") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"{path} is damaged ({type(error).__name__}: {line(error)}); copy the kit again") from None
    for name, expected in kit["files"].items():
        file = folder / name
        inside = file.resolve().is_relative_to(folder.resolve())
        if not inside or not file.is_file() or digest(file) != expected:
            raise ArtefactError(f"{file} is not the file that the kit was written with; copy the kit again")
    for place in [place for artefacts in kit["runtimes"].values() for place in artefacts.values()]:
        if f"{place}/{MANIFEST}" not in kit["files"]:
            raise ArtefactError(f"{path} has no hash of {place}/{MANIFEST}; write the kit again")
        for name in _files(read(folder / place)):
            if f"{place}/{name}" not in kit["files"]:
                raise ArtefactError(f"{path} has no hash of {place}/{name}; write the kit again")
    return kit


def kit_library(folder: Path, kit: Mapping[str, Any]) -> str | None:
    """The library of secateur's operators in a kit, or None; ArtefactError when it is not the one that was put in."""
    if kit.get("library") is None:
        return None
    path = folder / f"{OPERATORS}.so"
    if not path.is_file() or digest(path) != kit["library"]:
        raise ArtefactError(
            f"{path} is not the library that the kit was written with; copy the kit again, or pass --library"
        )
    return str(path.resolve())


def main(arguments: Sequence[str] | None = None) -> None:
    """The script: time a kit and write its results, or serve one artefact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="default: results.json beside this script")
    parser.add_argument("--library", help="secateur_onnx.so to use; default: the one of the kit")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--llama-cpp", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ours", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.batch, options.length, options.threads, options.library, options.ours)
        return
    if options.llama_cpp:
        serve_llama_cpp(options.llama_cpp, options.threads, options.length, exact=options.exact)
        return
    folder = Path(__file__).parent
    if not (folder / KIT).is_file():
        parser.error(f"there is no {KIT} beside this script; `secateur bench ... --export-kit FOLDER` writes one")
    try:
        results = run_kit(
            folder, options.threads, lambda text: print(text, file=sys.stderr, flush=True), options.library
        )
    except ArtefactError as error:
        sys.exit(printable(str(error)))
    target = options.output or folder / RESULTS
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for row in results["rows"]:
        took = row.get("error") or f"{row['median_ms']:.2f} ms ({row['low_ms']:.2f} to {row['high_ms']:.2f})"
        shape = f"{row['batch']} x {row['length']}" if row["length"] else str(row["batch"])
        print(printable(f"{row['runtime']:12} {row['model']:20} {shape}: {took}"))
    print(f"written: {target}")


if __name__ == "__main__":
    main()
