"""The memory of a streamed run: where calibration states are kept, and how many windows run through a block at once."""

import ctypes
import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import PlanError
from secateur.layout import Layout

TOKENS = 2048
"""Tokens that run through a block at once where memory allows."""
WORKSPACE = 150 * 2**20
"""Bytes that the mathematical libraries keep for themselves: the difference between estimate and measured peak for
SparseGPT at a width of 2816, rounded up.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory.

    batch: windows that run through a block at once.
    on_disk: whether states are kept on disk.
    expected: the peak in bytes, as estimated.
    """

    batch: int
    on_disk: bool
    expected: int


def choose(
    layout: Layout,
    blocks: Iterable[str],
    outside: int,
    windows: int,
    context: int,
    limit: int | None,
    *,
    dense: bool,
    tuned: bool,
) -> MemoryPlan:
    """The memory plan of a walk through the blocks.

    blocks: paths of the blocks.
    outside: bytes of the parameters outside the blocks that are in memory at once.
    windows, context: how many windows are read, and their tokens.
    limit: in bytes; None: no limit, with states in memory.
    dense: whether the states of the dense model are kept too.
    tuned: whether blocks are reconstructed.

    Raises PlanError when not even one window at a time fits.
    """
    needs = [_block_bytes(layout, path) for path in blocks]
    parameters = max((need.parameters for need in needs), default=0)
    grams = max((need.grams for need in needs), default=0)
    repair = max((need.repair for need in needs), default=0)
    per_token = max((need.per_token for need in needs), default=0) * (3 if tuned else 1)
    hidden = max((axis.size for axis in layout.axes.values() if axis.kind == "hidden"), default=0)
    states = 4 * hidden * windows * context * (4 if dense else 2)
    copies = 5 if tuned else 2 if dense else 1
    fixed = resident() + WORKSPACE + outside + parameters * copies + max(grams * 2, grams + repair)
    batch = max(1, min(windows, TOKENS // context))

    def need(size: int) -> int:
        return fixed + size * context * per_token

    if limit is None:
        return MemoryPlan(batch, on_disk=False, expected=need(batch) + states)
    while batch > 1 and need(batch) > limit:
        batch //= 2
    if need(batch) > limit:
        raise PlanError(
            f"one block of this model needs about {need(1) / 2**30:.1f} GiB with windows of {context} tokens, more "
            f"than the {limit / 2**30:.1f} GiB of --memory; allow more, or use a shorter --context"
        )
    on_disk = need(batch) + states > limit
    return MemoryPlan(batch, on_disk, need(batch) + (0 if on_disk else states))


@dataclass(frozen=True)
class _BlockBytes:
    """Bytes that one block takes.

    parameters: all of them, in float32.
    grams: those of its linear weights, in float32.
    repair: a method of repair at work on its widest weight: three matrices of its gram in float64, four of its size.
    per_token: what its linear weights read and return for one token, in float32.
    """

    parameters: int
    grams: int
    repair: int
    per_token: int


def _block_bytes(layout: Layout, path: str) -> _BlockBytes:
    """The memory of the block at a path."""
    sizes = {name: math.prod(layout.shape(name)) for name in layout.params if name.startswith(f"{path}.")}
    linears = {name: layout.linears[name] for name in sizes if name in layout.linears and len(layout.shape(name)) == 2}
    widths = {name: layout.shape(name)[linear.in_dim] for name, linear in linears.items()}
    inputs = {linear.reads: widths[name] for name, linear in linears.items()}
    largest = max(inputs.values(), default=0)
    outputs = sum(sizes[name] // width for name, width in widths.items())
    return _BlockBytes(
        parameters=4 * sum(sizes.values()),
        grams=sum(4 * width * width for width in inputs.values()),
        repair=3 * 8 * largest * largest + 4 * 4 * max((sizes[name] for name in linears), default=0),
        per_token=4 * (outputs + sum(inputs.values())),
    )


def whole_model(
    model: Any,
    trained: Sequence[str],
    tokens: int,
    beside: int,
    limit: int | None,
    what: str,
    instead: str,
    *,
    kept: int = 0,
) -> int:
    """The estimated peak in bytes of a stage that takes gradients of a whole model.

    In memory are the dense model and the pruned one in float32, the gradients and moments of the trained weights, what
    the layers and the logits keep for the backward pass, and the last states of the dense model.

    model: on any device.
    trained: the weights that take gradients.
    tokens: how many run through the model at once; the factors for them were fitted to peaks on SmolLM2-135M.
    beside: values for each trained weight beside itself (gradient, moments).
    limit: in bytes; None: what the system can give.
    what, instead: words for the error: what is in memory, and what takes less.
    kept: tokens for which the last states of the dense model are kept.

    Raises PlanError when the peak exceeds the limit.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    widths = sum(sum(p.shape) for name, p in model.named_parameters() if name in set(trained))
    config = model.config.get_text_config()
    vocabulary, hidden = getattr(config, "vocab_size", 0), getattr(config, "hidden_size", 0)
    values = 2 * sum(sizes.values()) + beside * sum(sizes[name] for name in trained)
    now = resident()
    loaded = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    need = max(now - loaded, 0) + WORKSPACE + 4 * values + tokens * (16 * vocabulary + 5 * widths) + 4 * kept * hidden
    free = available()
    room = limit if limit is not None else None if free is None else free + now
    if room is not None and need > room:
        raise PlanError(
            f"{what}, about {need / 2**30:.1f} GiB, more than {room / 2**30:.1f} GiB; allow more, or use {instead}"
        )
    return need


def resident() -> int:
    """Bytes of memory of this process now; 600 MiB where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 600 * 2**20
    return pages * 4096


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of up to 32 MiB: without this, a process grew by 30 MB for each block under SparseGPT.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def available() -> int | None:
    """Bytes that the system can still give, or None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
