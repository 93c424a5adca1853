"""Target: what secateur asks of a runtime, and what a runtime's file fills in. A new runtime is one more file."""

import contextlib
import importlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from secateur.deploy import runner
from secateur.deploy.operator_library import installed_library
from secateur.errors import SecateurError, meant

TARGETS = ("onnx", "openvino", "executorch", "litert")
"""Runtimes that take an exported artefact: the module of that name here holds its `TARGET`."""


GGUF = "gguf"
"""The target that takes a decoder itself rather than a traced program: see `secateur.deploy.gguf`."""

DECILM = "decilm"
"""The target that takes a decoder as a model folder: see `secateur.deploy.decilm`."""


class DeployError(SecateurError):
    """A model cannot be exported, or an artefact cannot be run, as asked."""


@dataclass(frozen=True)
class Port:
    """One input of a graph. A dimension is a number or a symbol: batch, length, target (a decoder's length), past, or
    samples (of a sound).

    fill: its values when inputs are made up: "ids" in [low, high), "normal", or a constant.
    at_most: dimension -> largest size, where the symbols are bounded.
    usual: how many samples a made-up sound has; 0 for what is no sound.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    fill: str | float = 0
    low: int = 0
    high: int = 1
    at_most: Mapping[int, int] = field(default_factory=dict)
    usual: int = 0


@dataclass(frozen=True)
class ExportUnit:
    """One graph to be written: a module, tensors to trace it with, and its ports."""

    module: nn.Module
    inputs: Mapping[str, Any]
    ports: Sequence[Port]


@dataclass(frozen=True)
class Written:
    """One graph as it lies in a folder: its files (the program first), and its outputs in order."""

    files: Sequence[str]
    outputs: Sequence[str]


class Writer(Protocol):
    """How a target writes graphs."""

    def __call__(self, graphs: Mapping[str, ExportUnit], folder: Path, *, int8: bool) -> dict[str, Written]:
        """Write graphs, by name, into a folder; `int8` with 8-bit weights. Returns what was written, by name."""


@dataclass(frozen=True)
class Target:
    """A runtime: how to write for it, and what it can hold.

    shapes: "any", "bounded" (a largest batch and length are fixed on export) or "fixed" (one shape).
    """

    name: str
    packages: tuple[str, ...]
    shapes: str
    write: Writer
    generates: bool = False
    int8: str = ""
    """How weights become 8-bit on top of pruning, or empty."""
    sparse: bool = False
    """Whether sparse linear layers can run on secateur's kernels there."""

    def describe(self) -> str:
        """One sentence: what an artefact for this target takes."""
        takes = {
            "any": "any batch and length",
            "bounded": "batches and lengths up to the ones it was exported for",
            "fixed": "one batch and length",
        }
        generation = ", generation with a key-value cache" if self.generates else ""
        return f"{self.name} takes {takes[self.shapes]}{generation}{f', {self.int8}' if self.int8 else ''}"

    def load(self, folder: Path, graph: str = "model", threads: int = 1) -> runner.Program:
        """A written graph, ready to run; DeployError when it is damaged."""
        return load(folder, graph, threads)

    def require(self) -> "Target":
        """The target itself; DeployError names the extra when one of its packages is missing."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise DeployError(f"{package} is not installed; `pip install 'secateur[{self.name}]'`")
        return self


def find(name: str) -> Target:
    """The target of that name; DeployError when there is none or its runtime is not installed."""
    if name == GGUF:
        raise DeployError("GGUF files are written by secateur.deploy.export_gguf")
    if name == DECILM:
        raise DeployError("DeciLM folders are written by secateur.deploy.export_decilm")
    if name not in TARGETS:
        raise DeployError(f"no target {name!r}; there is {', '.join(TARGETS)}{meant(name, TARGETS)}")
    target: Target = importlib.import_module(f"secateur.deploy.targets.{name}_target").TARGET
    return target.require()


def load(
    folder: Path | str, graph: str = "model", threads: int = 1, *, ours: Mapping[str, Any] | None = None
) -> runner.Program:
    """A graph of any artefact on its runtime; what goes wrong there, on loading or when it runs, is a DeployError.

    ours: as `runner.load` takes it, for an artefact that the caller made.
    """
    with translated():
        program = runner.load(folder, graph, threads, installed_library(), ours=ours)

    def run(feed: runner.Feed) -> dict[str, Any]:
        with translated():
            return program(feed)

    return run


def read(folder: Path | str) -> dict[str, Any]:
    """The description of an artefact."""
    with translated():
        return runner.read(folder)


def verify_files(folder: Path | str) -> int:
    """How many files of an artefact have the SHA-256 of its description; DeployError for one that has changed."""
    with translated():
        return runner.verify_files(folder)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise errors of `runner`, which imports nothing of secateur, as DeployError."""
    try:
        yield
    except runner.ArtefactError as error:
        raise DeployError(str(error)) from None


@contextlib.contextmanager
def writing(target: str, model: nn.Module) -> Iterator[None]:
    """Keep exporters quiet, and raise what goes wrong in them as one sentence, which names an operation that the target
    lacks.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        stack.callback(logging.disable, before)
        logging.disable(logging.CRITICAL)
        try:
            yield
        except (SecateurError, OSError, MemoryError):
            raise
        except Exception as error:  # every exporter breaks in its own way
            raise refusal(target, model, error) from error


LACKS = re.compile(
    r"(?:No ONNX function found|No conversion rule|not supported|[Uu]nsupported|Lowering not found|Missing out variant"
    r"|not (?:been )?implemented|not in Core ATen)"
)
OPERATION = re.compile(r"\b((?:aten|prims|torchvision|transformers)(?:\.|::)\w+)")


def refusal(target: str, model: nn.Module, error: BaseException) -> DeployError:
    """Why a target cannot hold a model, from the chain of exceptions of its exporter."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    name = type(model).__name__
    for cause in reversed(chain):
        text = str(cause)
        if LACKS.search(text):
            operations = sorted(set(OPERATION.findall(text)))
            if operations:
                return DeployError(
                    f"{target} has no {', '.join(operations[:3])}, which {name} uses; choose another target, or "
                    "replace the operation in the model"
                )
    first = next((cause for cause in reversed(chain) if str(cause).strip()), error)
    return DeployError(
        f"{name} cannot be written for {target} ({type(first).__name__}: {runner.line(first)}); choose another target"
    )


def local_folder(source: object) -> Path | None:
    """The folder that a model is read from; None for a hub id and for a model in memory."""
    return Path(source) if isinstance(source, str | Path) and Path(source).is_dir() else None
