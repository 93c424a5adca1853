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
    from secateur.runtime.linear import SparseLinear
    from secateur.runtime.native import available_isas, isa, onnx_library
    from secateur.runtime.store import load, save
    from secateur.runtime.swap import LayerReport, Report, compile

_HOME = {
    "compile": "swap",
    "Report": "swap",
    "LayerReport": "swap",
    "SparseLinear": "linear",
    "save": "store",
    "load": "store",
    "isa": "native",
    "available_isas": "native",
    "onnx_library": "native",
}
__all__ = ["LayerReport", "Report", "SparseLinear", "available_isas", "compile", "isa", "load", "onnx_library", "save"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"secateur.runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value
