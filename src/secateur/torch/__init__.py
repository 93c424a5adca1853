"""The PyTorch host: layout by tracing, statistics, holding zeros, real removal, saving and loading.

Its modules and packages are loaded when they are first used: importing this one does not import torch.
"""

import importlib
from typing import Any

_MODULES = ("blockwise", "data", "files", "host", "open", "repair_loops", "shrink", "stats", "stream", "trace", "train")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
