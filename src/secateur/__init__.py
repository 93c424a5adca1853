"""secateur makes a trained Transformer smaller and faster, and proves that it did.

The names below are loaded when they are first used: importing the package imports no framework.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import wrapt

from secateur._version import __version__

if TYPE_CHECKING:
    from secateur import criteria as criteria
    from secateur import repair as repair
    from secateur.budget import OWL, Global, PerKind, Threshold, Uniform
    from secateur.check import verify
    from secateur.find_host import open
    from secateur.layout import Axis, Layout
    from secateur.plan import Plan
    from secateur.pruning import prune
    from secateur.select import NM, Block, Element, Unit
    from secateur.stats import Stats
    from secateur.torch.files.saving import load
    from secateur.torch.train.callback import Hold

_HOME = {
    "Axis": "secateur.layout",
    "Block": "secateur.select",
    "Element": "secateur.select",
    "Global": "secateur.budget",
    "Hold": "secateur.torch.train.callback",
    "Layout": "secateur.layout",
    "OWL": "secateur.budget",
    "NM": "secateur.select",
    "PerKind": "secateur.budget",
    "Plan": "secateur.plan",
    "Stats": "secateur.stats",
    "Threshold": "secateur.budget",
    "Uniform": "secateur.budget",
    "Unit": "secateur.select",
    "load": "secateur.torch.files.saving",
    "open": "secateur.find_host",
    "prune": "secateur.pruning",
    "verify": "secateur.check",
}
_MODULES = (
    *("budget", "check", "cost", "criteria", "data", "deploy", "errors", "host", "keras", "layout", "metrics", "plan"),
    *("pruning", "recipe", "repair", "runtime", "schedule", "search", "select", "stats", "tasks", "torch"),
)
"""Public modules and packages."""

__all__ = [
    "NM",
    "OWL",
    "Axis",
    "Block",
    "Element",
    "Global",
    "Hold",
    "Layout",
    "PerKind",
    "Plan",
    "Stats",
    "Threshold",
    "Uniform",
    "Unit",
    "__version__",
    "criteria",
    "load",
    "open",
    "prune",
    "repair",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"secateur.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


@wrapt.when_imported("transformers.quantizers.auto")
def _teach_transformers(_: Any) -> None:
    """Let `from_pretrained` open what secateur saved, from the moment that transformers can load models."""
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module(
            "secateur.torch.files.from_pretrained_hook"
        )  # which registers itself, also when it is what imports this
