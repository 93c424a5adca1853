"""Finds the compiled kernels, and warns once when they are missing."""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ISAS = ("auto", "portable", "neon", "avx2", "avx512")


@functools.cache
def load_native() -> ModuleType | None:
    """The module of compiled kernels, or None; its absence causes one warning in a process."""
    try:
        return import_module("secateur.kernels._native")
    except ImportError as error:
        warnings.warn(
            f"secateur.runtime has no compiled kernels ({error}); sparse layers run on a slow path. Install a "
            "C++17 compiler and reinstall secateur to have them.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def isa_code(name: str) -> int:
    """The number of an instruction set for the C interface.

    Raises:
        ValueError: for a name that is not one of `ISAS`.
    """
    if name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}: use one of {', '.join(ISAS)}")
    return ISAS.index(name)


def isa(requested: str = "auto") -> str:
    """The instruction set that the kernels run on: 'avx512', 'avx2', 'neon', 'portable' or 'python'.

    With 'auto' the environment variable SECATEUR_ISA decides, else the CPU.

    Raises:
        ValueError: when this CPU or this build lacks the instruction set that was asked for.
    """
    code = isa_code(requested)
    native = load_native()
    if native is None:
        return "python"
    resolved = native.resolve_isa(code)
    if resolved < 0:
        raise ValueError(
            f"instruction set {requested!r} (or what SECATEUR_ISA names) is not available on this CPU or in this "
            f"build; available: {', '.join(available_isas())}"
        )
    return ISAS[resolved]


def available_isas() -> tuple[str, ...]:
    """The instruction sets that run here, the plainest first; empty without compiled kernels."""
    native = load_native()
    if native is None:
        return ()
    return tuple(name for code, name in enumerate(ISAS) if code > 0 and native.resolve_isa(code) > 0)


def onnx_library() -> str:
    """The path of the custom-operator library of the kernels, for ONNX Runtime's `register_custom_ops_library`.

    Raises:
        FileNotFoundError: when secateur was installed without it.
    """
    built = find_spec("secateur.kernels._native")  # an editable install keeps compiled files in another folder
    module = built.origin if built is not None and built.origin is not None else __file__
    path = Path(module).with_name("secateur_onnx.so")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: secateur was installed without a C++17 compiler; install one and reinstall secateur"
        )
    return str(path)


@functools.cache
def share_openmp() -> bool:
    """Let the kernels run on the OpenMP threads that torch has started, if there are any; true when they do.

    Two pools would compete for the same cores: OpenMP threads spin for a while after each parallel region.
    """
    native = load_native()
    if native is None:
        return False
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return False
    for path in sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps))):
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value
        if address:
            native.use_openmp(address)
            return True
    return False
