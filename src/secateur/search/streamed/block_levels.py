"""Curvature and levels of the axes of one block, from what was recorded of the dense model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from secateur.layout import Layout
from secateur.pruning import earlier_zeros
from secateur.repair.removable import Removable, removable
from secateur.search.levels import Levels, levels_of
from secateur.stats import Stats, Tally
from secateur.tasks.base.task import Task
from secateur.torch.blockwise.recorded import Recorded
from secateur.torch.host import TorchHost
from secateur.torch.stats.curvature import Watch, called_by, sums_of
from secateur.torch.stats.padding import Padding


def axes_by_block(
    layout: Layout, paths: Sequence[str], is_single: Callable[[str], bool]
) -> tuple[dict[str, list[Removable]], dict[str, str]]:
    """Block -> the axes that are searched in it; and for each other axis a sentence that says why it is not.

    is_single: whether a parameter is one tensor of the files, so that a part of it can be written.
    """
    found, notes = removable(layout)
    blocks: dict[str, list[Removable]] = {path: [] for path in paths}
    for name, axis in found.items():
        members = [member for member in layout.members(name) if member not in layout.buffers]
        home = next((path for path in paths if all(member.startswith(f"{path}.") for member in members)), None)
        if layout.axis(name).kind == "expert":
            notes[name] = f"{name} stays whole, as experts are not searched block by block"
        elif home is None:
            notes[name] = f"{name} stays whole, as it lies in more than one block"
        elif not all(map(is_single, members)):
            notes[name] = f"{name} stays whole, as its weights are merged when they are read"
        else:
            blocks[home].append(axis)
    notes |= {
        axis.name: f"{axis.name} stays whole, as layers are not searched block by block"
        for axis in layout.of_kind("layer")
    }
    return blocks, notes


def curvature_of(
    host: TorchHost, recorded: Recorded, task: Task, block: int, axes: Sequence[Removable], *, keep: bool
) -> Stats:
    """The sums of `secateur.torch.stats.curvature.collect_curvature` for the axes of one block, which is in memory.

    host: of the model that was recorded. keep: whether the gradient at the output of the block before is kept.
    """
    model, tally, padding = host.model, Tally(), Padding(host.layout, host.model)
    module = model.get_submodule(recorded.paths[block])
    called = called_by(model, host.layout, lambda: recorded.call(block, 0)[0].run(module))
    watch = Watch(model, host.layout, {axis.axis: axis for axis in axes}, tally, padding, called)

    @contextmanager
    def over(batch: Any) -> Iterator[None]:
        padding.see(batch)
        with watch.over(batch):
            yield

    recorded.backward(block, over, lambda batch: watch.add_batch(task.examples_of(batch)), keep=keep)
    return sums_of(tally)


def block_levels(host: TorchHost, stats: Stats, axes: Sequence[Removable], method: str) -> Levels:
    """The levels of the axes of one block, which is in memory; a weight that has zeros already makes up for nothing."""
    host.plan = earlier_zeros({reader: host.read(reader) for axis in axes for reader in axis.readers})
    return levels_of(host, stats, method, only={axis.axis for axis in axes})


def joined(parts: Sequence[Levels], notes: Mapping[str, str]) -> Levels:
    """The levels of all blocks as one. notes: axes that are not searched, and why."""
    axes = {name: axis for part in parts for name, axis in part.axes.items()}
    more = {name: note for part in parts for name, note in part.notes.items() if name not in axes}
    return Levels(parts[0].method, axes, notes={**more, **notes})
