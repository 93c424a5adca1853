"""Host: what secateur needs of a framework. Each framework has one adapter, and all other code uses this protocol.

`secateur.open` finds the adapter; every adapter passes the tests of `tests/conformance.py`.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from secateur.arrays import Array
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.stats import Stats


@runtime_checkable
class Host(Protocol):
    """A model in its framework. `layout` describes the model in its present state: `resize` changes it."""

    layout: Layout

    def read(self, param: str) -> Array:
        """The parameter as an array of the framework (no copy where that is possible)."""
        ...

    def write(self, param: str, array: Array) -> None:
        """Overwrite a parameter, shape unchanged."""
        ...

    def collect(
        self,
        needs: Collection[str],
        data: Iterable[Any],
        axes: Sequence[str] | None = None,
        weights: Sequence[str] | None = None,
    ) -> Stats:
        """Run the model over batches and sum the quantities of `secateur.stats`, without padding.

        axes: the axes whose unit quantities are wanted (default: all that can be pruned).
        weights: the linear weights whose grams are wanted (default: all).
        """
        ...

    def outputs(self, batch: Any) -> list[np.ndarray]:
        """All outputs of the model for one batch, in evaluation mode, flattened; integers and complex numbers too."""
        ...

    def masked(self, plan: Plan) -> AbstractContextManager[Any]:
        """A context in which what the plan removes is zero (whole layers are bypassed); undone at its end."""
        ...

    def hold(self, plan: Plan) -> AbstractContextManager[Any]:
        """A context for training: what the plan removes, and what was pruned before the model was opened, is zero after
        every optimizer step, and after the context.
        """
        ...

    def copy(self) -> "Host":
        """An independent copy of model and layout."""
        ...

    def resize(self, plan: Plan) -> None:
        """Remove the units that the plan does not keep; write zeros for its element masks."""
        ...

    def save(self, folder: Path | str, plan: Plan | None = None, *, overwrite: bool = False) -> None:
        """Write a folder that the framework can load, whole or not at all."""
        ...
