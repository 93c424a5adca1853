"""Runs pruned models on secateur's own sparse CPU kernels: zeros are skipped instead of multiplied.

    fast = secateur.runtime.compile(model)
    print(fast.summary())
    secateur.runtime.save(fast, "folder"); fast = secateur.runtime.load("folder")

Importing this module does not import torch; its names do when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.kernels.native import available_isas, isa, onnx_library
    from secateur.runtime.compile_model import LayerReport, Report, compile
    from secateur.runtime.layers.linear import SparseLinear
    from secateur.runtime.saving import load, save

_HOME = {
    "compile": "secateur.runtime.compile_model",
    "Report": "secateur.runtime.compile_model",
    "LayerReport": "secateur.runtime.compile_model",
    "SparseLinear": "secateur.runtime.layers.linear",
    "save": "secateur.runtime.saving",
    "load": "secateur.runtime.saving",
    "isa": "secateur.kernels.native",
    "available_isas": "secateur.kernels.native",
    "onnx_library": "secateur.kernels.native",
}
__all__ = ["LayerReport", "Report", "SparseLinear", "available_isas", "compile", "isa", "load", "onnx_library", "save"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
