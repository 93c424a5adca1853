"""Where a pruned model runs: written for a runtime, run there, compared with PyTorch, weighed and timed.

    secateur.deploy.export("folder", "onnx", "out")

One target a file (`onnx`, `openvino`, `executorch`, `litert`); each is a `Target`, which writes artefacts and describes
what it can hold. `device` loads and runs them; it needs no secateur, so that an export kit can carry it away.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.deploy.benching import bench
    from secateur.deploy.exporting import export
    from secateur.deploy.generation import generate, generator
    from secateur.deploy.kit import read_results, write_kit
    from secateur.deploy.table import latency_table

_HOME = {
    "bench": "benching",
    "export": "exporting",
    "generate": "generation",
    "generator": "generation",
    "latency_table": "table",
    "read_results": "kit",
    "write_kit": "kit",
}
__all__ = ["bench", "export", "generate", "generator", "latency_table", "read_results", "write_kit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.deploy.{_HOME[name]}"), name)
