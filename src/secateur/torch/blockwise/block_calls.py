"""The arguments with which a model calls its blocks, found by a run of the model in which earlier blocks are replaced.

To find the arguments of block i, the model runs with every earlier block replaced by its recorded output, and stops
when it reaches block i. Whatever the model computes before (masks, rotary tables, cross-attention states) is then right
by construction, and only the last output of each chain of blocks has to be kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        """The output of a block for this call."""
        return block(*self.args, **self.kwargs)


class _Reached(Exception):
    """Ends a run of the model at a block."""

    def __init__(self, call: BlockCall) -> None:
        super().__init__(call.path)
        self.call = call


def chains(layout: Layout) -> dict[str, list[str]]:
    """Module list -> paths of its blocks, for the layer axes of a layout; lists inside another list are left out.

    Raises ModelError when there is none.
    """
    sizes = {axis.path: axis.size for axis in layout.axes.values() if axis.kind == "layer" and axis.path}
    outer = {path: n for path, n in sizes.items() if not any(path.startswith(f"{around}.") for around in sizes)}
    if not outer:
        raise ModelError("the model has no chain of layers, so it cannot be pruned block by block; use secateur.prune")
    return {path: [f"{path}.{i}" for i in range(size)] for path, size in outer.items()}


def block_paths(layout: Layout) -> list[str]:
    """Paths of all blocks, chain by chain."""
    return [path for paths in chains(layout).values() for path in paths]


@contextlib.contextmanager
def replaced(model: nn.Module, recorded: Mapping[str, Any], stops: Sequence[str]) -> Iterator[None]:
    """While the context lasts, a block in `recorded` returns its recorded output, and a call of a block in `stops` ends
    the run of the model (see `next_call`).
    """
    changed = []

    def answer(value: Any) -> Any:
        return lambda *args, **kwargs: value

    def stop(path: str) -> Any:
        def reached(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(BlockCall(path, args, kwargs))

        return reached

    try:
        for path, value in recorded.items():
            module = model.get_submodule(path)
            vars(module)["forward"] = answer(value)
            changed.append(module)
        for path in stops:
            module = model.get_submodule(path)
            vars(module)["forward"] = stop(path)
            changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def next_call(
    model: nn.Module, batch: Mapping[str, Any], recorded: Mapping[str, Any], stops: Sequence[str]
) -> BlockCall:
    """The call of the first of `stops` that the model makes on a batch; see `replaced`."""
    try:
        with replaced(model, recorded, stops):
            model(**batch)
    except _Reached as reached:
        return reached.call
    raise ModelError(f"the model ran to its end without calling {', '.join(stops[:3])}")
