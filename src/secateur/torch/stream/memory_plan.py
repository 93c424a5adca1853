"""What a streamed run may take: where the calibration states lie, and how many windows go through a block at once."""

import ctypes
import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import PlanError
from secateur.layout import Layout

TOKENS = 2048
"""Tokens that go through a block at once where memory allows."""
WORKSPACE = 150 * 2**20
"""What the mathematical libraries keep for themselves, in bytes: what the estimate lacked for SparseGPT at a width of
2816, where it was measured, rounded up.
"""


@dataclass(frozen=True)
class MemoryPlan:
    """batch: windows at once. on_disk: whether states lie on disk. expected: the peak in bytes, as estimated."""

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
    """Choose for a limit in bytes; None: states in memory.

    blocks: paths of the blocks. outside: bytes of the parameters outside them that are read. dense: whether the states
    of the dense model are kept beside. tuned: whether blocks are reconstructed.

    Raises PlanError when not even one window at a time fits.
    """
    block = grams = widest = through = 0
    for path in blocks:
        names = [name for name in layout.params if name.startswith(f"{path}.")]
        sizes = {name: _elements(layout, name) for name in names}
        block = max(block, 4 * sum(sizes.values()))
        linears = [name for name in names if name in layout.linears and len(layout.shape(name)) == 2]
        inputs = {layout.linears[n].reads: layout.shape(n)[layout.linears[n].in_dim] for n in linears}
        grams = max(grams, sum(4 * n * n for n in inputs.values()))
        largest = max((n for n in inputs.values()), default=0)
        widest = max(widest, 3 * 8 * largest * largest + 4 * 4 * max((sizes[n] for n in linears), default=0))
        out = sum(sizes[n] // layout.shape(n)[layout.linears[n].in_dim] for n in linears)
        through = max(through, 4 * (out + sum(inputs.values())))
    hidden = max((axis.size for axis in layout.axes.values() if axis.kind == "hidden"), default=0)
    states = 4 * hidden * windows * context * (4 if dense else 2)
    copies = 5 if tuned else 2 if dense else 1
    fixed = resident() + WORKSPACE + outside + block * copies + max(grams * 2, grams + widest)
    batch = max(1, min(windows, TOKENS // context))

    def need(size: int) -> int:
        return fixed + size * context * through * (3 if tuned else 1)

    if limit is None:
        return MemoryPlan(batch, False, need(batch) + states)
    while batch > 1 and need(batch) > limit:
        batch //= 2
    if need(batch) > limit:
        raise PlanError(
            f"one block of this model needs about {need(1) / 2**30:.1f} GiB with windows of {context} tokens, more "
            f"than the {limit / 2**30:.1f} GiB of --memory; allow more, or use a shorter --context"
        )
    on_disk = need(batch) + states > limit
    return MemoryPlan(batch, on_disk, need(batch) + (0 if on_disk else states))


def whole_model(
    model: Any,
    trained: Sequence[str],
    tokens: int,
    beside: int,
    limit: int | None,
    what: str,
    instead: str,
    kept: int = 0,
) -> int:
    """The peak in bytes of what takes gradients of a whole model, as estimated; PlanError when it would not fit into
    `limit`, or into what the system has where that is None.

    It holds the dense model and the pruned one in float32, `beside` more values for each trained weight (gradient,
    moments), what the layers and the logits of `tokens` tokens keep for the backward pass, and the dense model's last
    states for `kept` tokens. model: on any device.
    what, instead: words for the sentence. The factors of the last term were fitted to peaks on SmolLM2-135M.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    widths = sum(sum(p.shape) for name, p in model.named_parameters() if name in set(trained))
    config = model.config.get_text_config()
    vocabulary, hidden = getattr(config, "vocab_size", 0), getattr(config, "hidden_size", 0)
    held = 2 * sum(sizes.values()) + beside * sum(sizes[name] for name in trained)
    now = resident()
    loaded = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    need = max(now - loaded, 0) + WORKSPACE + 4 * held + tokens * (16 * vocabulary + 5 * widths) + 4 * kept * hidden
    free = available()
    room = limit if limit is not None else None if free is None else free + now
    if room is not None and need > room:
        raise PlanError(
            f"{what}, about {need / 2**30:.1f} GiB, more than {room / 2**30:.1f} GiB; allow more, or use {instead}"
        )
    return need


def _elements(layout: Layout, name: str) -> int:
    count = 1
    for size in layout.shape(name):
        count *= size
    return count


def resident() -> int:
    """Bytes that this process holds now; a guess where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 600 * 2**20
    return pages * 4096


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of up to 32 MiB: without this, what a process holds grew by 30 MB a block under SparseGPT.
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
