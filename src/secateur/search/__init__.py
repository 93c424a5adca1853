"""From a target to a plan: what a user asks for in speed and quality becomes what each axis keeps.

    found = secateur.search.automatic(host, task, target, rows)

One pass of statistics gives the `levels` of every axis: an order in which its units go, and a curve of the expected
divergence. `costs` says what each size costs, `choice` finds the sizes of least expected divergence within the cost,
`refine` looks around on the true divergence, `heal` trains with the dense model as teacher, `measure` times the result
on the runtime. `automatic` walks through all of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.search.target import Limit, Target
    from secateur.search.walk import automatic

_HOME = {
    "Limit": "secateur.search.target",
    "Target": "secateur.search.target",
    "automatic": "secateur.search.walk",
}
__all__ = ["Limit", "Target", "automatic"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
