"""Exports pruned models to runtimes, compares them with PyTorch there, and measures their size and latency.

    secateur.deploy.export("folder", "onnx", "out")
    secateur.deploy.export_gguf("folder", "out", quantize="q8_0")
    secateur.deploy.export_decilm("folder", "out")

`targets/` has one file for each runtime (`onnx`, `openvino`, `executorch`, `litert`) with its `Target`, which writes
artefacts and describes what it can hold; `gguf/` writes decoders for llama.cpp, `decilm/` for servers that read
`block_configs`. `runner` loads and runs artefacts; it needs no secateur, so that an export kit can carry it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.deploy.decilm.config_class import register_decilm
    from secateur.deploy.decilm.export import export_decilm
    from secateur.deploy.gguf.export import export_gguf
    from secateur.deploy.gguf.generate import generate_text
    from secateur.deploy.jobs.bench import bench
    from secateur.deploy.jobs.cascade import cascade, open_cascade
    from secateur.deploy.jobs.export import export
    from secateur.deploy.jobs.generation import generate, generator
    from secateur.deploy.jobs.kit import read_results, write_kit
    from secateur.deploy.jobs.latency_table import latency_table

_HOME = {
    "bench": "secateur.deploy.jobs.bench",
    "cascade": "secateur.deploy.jobs.cascade",
    "export": "secateur.deploy.jobs.export",
    "export_decilm": "secateur.deploy.decilm.export",
    "export_gguf": "secateur.deploy.gguf.export",
    "generate": "secateur.deploy.jobs.generation",
    "generate_text": "secateur.deploy.gguf.generate",
    "generator": "secateur.deploy.jobs.generation",
    "latency_table": "secateur.deploy.jobs.latency_table",
    "open_cascade": "secateur.deploy.jobs.cascade",
    "register_decilm": "secateur.deploy.decilm.config_class",
    "read_results": "secateur.deploy.jobs.kit",
    "write_kit": "secateur.deploy.jobs.kit",
}
__all__ = [
    "bench",
    "cascade",
    "export",
    "export_decilm",
    "export_gguf",
    "generate",
    "generate_text",
    "generator",
    "latency_table",
    "open_cascade",
    "read_results",
    "register_decilm",
    "write_kit",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
