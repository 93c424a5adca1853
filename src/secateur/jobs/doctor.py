"""What of secateur works on this machine: its kernels, the packages of each extra, and where it keeps things. Nothing
heavy is imported.
"""

import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur._version import __version__
from secateur.deploy import runner
from secateur.files.cache import cache_folder
from secateur.kernels import native

PURPOSES: Mapping[str, str] = {
    "torch": "PyTorch and Hugging Face models",
    "onnx": "export to ONNX Runtime, and timing there",
    "openvino": "export to OpenVINO, and timing there",
    "executorch": "export to ExecuTorch, and timing there",
    "litert": "export to LiteRT, and timing there",
    "gguf": "GGUF files of language models, run by llama.cpp",
    "lm-eval": "tasks of lm-evaluation-harness",
    "data": "Parquet, data sets of the hub, images and sounds",
    "metrics": "F1, BLEU, word error rates and the like",
    "report": "HTML reports with charts",
    "train": "fine-tuning and plots",
    "keras": "Keras models",
    "tensorflow": "Keras on TensorFlow, TFLite and SavedModel",
    "demo": "secateur demo",
}
"""Extra -> what it is for."""
_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+)(?:\[(?P<extras>[^\]]*)\])?(?P<versions>[^;]*)(?:;(?P<marker>.*))?""")
_EXTRA = re.compile(r"""extra\s*==\s*['"](?P<extra>[\w-]+)['"]""")


@dataclass(frozen=True)
class Package:
    """A package that an extra asks for. version: None where it is not installed. wanted: the versions that do."""

    name: str
    version: str | None
    wanted: str

    @property
    def is_good(self) -> bool:
        """Whether it is installed, and not too old."""
        least = re.search(r">=\s*([\d.]+)", self.wanted)
        if self.version is None or least is None:
            return self.version is not None
        return _numbers(self.version) >= _numbers(least[1])


@dataclass(frozen=True)
class Extra:
    """An extra of secateur. packages: its own. included: those of the extras that it includes."""

    name: str
    purpose: str
    packages: Sequence[Package]
    included: Sequence[Package] = ()

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed or too old."""
        return [package.name for package in (*self.packages, *self.included) if not package.is_good]

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'secateur[{self.name}]'"


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels. isa: the instruction set in use, or what is wrong. has_onnx: whether our operators for ONNX
    Runtime are there."""

    is_compiled: bool
    isa: str
    available: Sequence[str]
    has_onnx: bool


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    machine: as `runner.machine` gives it. usable_cores: those that this process may use. omp_threads: the environment
    variable OMP_NUM_THREADS. cache: the folder of measurements and searches, with its bytes and files.
    problems: sentences on what keeps secateur itself from working.
    """

    version: str
    machine: Mapping[str, Any]
    usable_cores: int
    omp_threads: str | None
    kernels: Kernels
    extras: Sequence[Extra]
    cache: Path
    cache_bytes: int
    cache_files: int
    problems: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        extras = [
            {**asdict(extra), "is_complete": not extra.missing, "missing": extra.missing, "install": extra.install}
            for extra in self.extras
        ]
        return {**asdict(self), "cache": str(self.cache), "extras": extras}


def diagnose() -> Diagnosis:
    """Look at the installation."""
    kernels = kernels_here()
    files = [file for file in cache_folder().rglob("*") if file.is_file()]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Diagnosis(
        version=__version__,
        machine=runner.machine(),
        usable_cores=usable,
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        kernels=kernels,
        extras=extras_of(requirements()),
        cache=cache_folder(),
        cache_bytes=sum(file.stat().st_size for file in files),
        cache_files=len(files),
        problems=problems_of(kernels),
    )


def kernels_here() -> Kernels:
    """The compiled kernels of this installation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `problems_of` says it
        is_compiled = native.load_native() is not None
    try:
        isa = native.isa()
    except ValueError as error:
        isa = str(error)
    try:
        has_onnx = bool(native.onnx_library())
    except FileNotFoundError:
        has_onnx = False
    return Kernels(is_compiled, isa, native.available_isas(), has_onnx)


def problems_of(kernels: Kernels) -> list[str]:
    """What keeps secateur's own kernels from running."""
    if not kernels.is_compiled:
        return [
            "secateur was installed without its compiled kernels; install a C++17 compiler, then "
            "`pip install --force-reinstall --no-deps secateur`"
        ]
    if kernels.isa not in native.ISAS:
        return [f"{kernels.isa}; set SECATEUR_ISA to one of these, or unset it"]
    return []


def requirements() -> list[str]:
    """What secateur's own metadata asks for; nothing where it runs without being installed."""
    try:
        return importlib.metadata.requires("secateur") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def extras_of(lines: Iterable[str]) -> list[Extra]:
    """The extras of `PURPOSES` among requirements such as `onnx>=1.21; extra == "onnx"`, those they include too."""
    asked: dict[str, dict[str, str]] = {name: {} for name in PURPOSES}
    included: dict[str, list[str]] = {name: [] for name in PURPOSES}
    for line in lines:
        found, extra = _REQUIREMENT.fullmatch(line.strip()), _EXTRA.search(line)
        if found is None or extra is None or extra["extra"] not in PURPOSES:
            continue
        if found["name"].lower() == "secateur":
            included[extra["extra"]] += [name.strip() for name in found["extras"].split(",")]
        else:
            asked[extra["extra"]][found["name"]] = found["versions"].strip()
    extras = []
    for name in (name for name in PURPOSES if asked[name]):
        others = [name]
        for other in others:
            others += [more for more in included.get(other, ()) if more not in others]
        rest = {package: wanted for other in others[1:] for package, wanted in asked.get(other, {}).items()}
        parts = [[Package(p, _version_of(p), wanted) for p, wanted in part.items()] for part in (asked[name], rest)]
        extras.append(Extra(name, PURPOSES[name], *parts))
    return extras


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """1.21.0rc1 -> [1, 21, 0]; zeros at the end do not count."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
