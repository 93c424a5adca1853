"""Host: what secateur asks of a framework. One adapter per framework; everything else is written against this.

`secateur.open` finds the adapter; `tests/conformance.py` is what an adapter has to pass.
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
    """A model in its framework. `layout` describes the model as it now is: after `resize` it is another one."""

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
        """Run the model over batches and sum up the quantities of `secateur.stats`, padding left out.

        axes: the axes whose unit quantities are wanted (default: all that can be pruned).
        weights: the linear weights whose grams are wanted (default: all).
        """
        ...

    def outputs(self, batch: Any) -> list[np.ndarray]:
        """The floating-point outputs of the model for one batch, in evaluation mode."""
        ...

    def masked(self, plan: Plan) -> AbstractContextManager[Any]:
        """A context in which everything the plan removes is zero (whole layers are bypassed); undone at its end."""
        ...

    def hold(self, plan: Plan) -> AbstractContextManager[Any]:
        """A context for training in which what the plan removes, and what had been pruned when the model was opened, is
        zero after every optimizer step, and stays zero.
        """
        ...

    def copy(self) -> "Host":
        """An independent copy of model and layout."""
        ...

    def resize(self, plan: Plan) -> None:
        """Remove the units that the plan does not keep; write zeros for its element masks."""
        ...

    def save(self, folder: Path | str, plan: Plan | None = None, *, overwrite: bool = False) -> None:
        """Write a folder that the framework loads again, whole or not at all."""
        ...
