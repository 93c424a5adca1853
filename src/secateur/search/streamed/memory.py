"""The memory and the disk that pruning of units block by block takes, from the sizes of the model alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import PlanError
from secateur.layout import Layout
from secateur.repair.removable import Removable
from secateur.repair.structured import COPIES
from secateur.torch.stream.memory_plan import WORKSPACE, resident

LOGITS = 24
"""Bytes for each token and entry of the vocabulary: six copies of the logits, from the model to their gradient."""


@dataclass(frozen=True)
class UnitsPlan:
    """What a run takes, in bytes.

    expected: the peak of its memory, as estimated. disk: the states that are kept beside the output while it runs.
    """

    expected: int
    disk: int


def plan_memory(
    layout: Layout,
    model: Any,
    blocks: Mapping[str, Sequence[Removable]],
    outside: Sequence[int],
    windows: tuple[int, int],
    limit: int | None,
) -> UnitsPlan:
    """The memory of all stages, the largest of which counts.

    blocks: path -> the axes in it that are searched. outside: bytes of each tensor outside the blocks, in float32.
    windows: how many there are, and their tokens; one is in memory at a time. limit: in bytes; None for no limit.

    Raises PlanError, with the stage, when one needs more than the limit.
    """
    count, context = windows
    config = model.config.get_text_config()
    embedding = max(outside, default=0)
    fixed = resident() + WORKSPACE + embedding
    passes, levels = zip(*(_block(layout, path, axes, context) for path, axes in blocks.items()), strict=True)
    stages = {
        f"the output layer with one window of {context} tokens": (
            fixed - embedding + sum(outside) + LOGITS * context * config.vocab_size
        ),
        f"one block with one window of {context} tokens": fixed + max(passes),
        "one block with the curvature of its widest layer": fixed + max(levels),
    }
    worst = max(stages, key=stages.__getitem__)
    if limit is not None and stages[worst] > limit:
        raise PlanError(
            f"{worst} needs about {stages[worst] / 2**30:.1f} GiB, more than the {limit / 2**30:.1f} GiB of --memory; "
            f"allow more{', or use a shorter --context' if 'window' in worst else ''}"
        )
    states = 4 * config.hidden_size * count * context
    return UnitsPlan(stages[worst], 2 * len(blocks) * states)


def _block(layout: Layout, path: str, axes: Iterable[Removable], context: int) -> tuple[int, int]:
    """Bytes of a block while it is run forward and backward, and while its units are ordered or refitted."""
    shapes = {name: layout.shape(name) for name in layout.params if name.startswith(f"{path}.")}
    parameters = 4 * sum(math.prod(shape) for shape in shapes.values())
    activations = 3 * 4 * context * sum(sum(shapes[name]) for name in layout.linears if name in shapes)
    matrices = [(shapes[axis.weight], layout.linears[axis.weight].in_dim) for axis in axes if axis.weight is not None]
    pairs = [(shape[in_dim], shape[1 - in_dim]) for shape, in_dim in matrices]  # inputs and outputs
    sums = sum(4 * (n * n + m * m) for n, m in pairs)
    fresh = max((4 * (n * n + 2 * m * m) for n, m in pairs), default=0)
    work = max((4 * n * n + 8 * (COPIES * n * n + 2 * m * m + 2 * n * m) for n, m in pairs), default=0)
    return parameters + activations + sums + fresh, parameters + sums + work
