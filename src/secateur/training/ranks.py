"""The processes of `torchrun`: which one this is, what they share, and who does what only one may do.

The first process decides, measures, saves and prints. The others wait for what it decides, and train along.
Importing this module does not import torch.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one may measure for hours."""

Value = TypeVar("Value")


def count() -> int:
    """How many processes train together; 1 without `torchrun`."""
    started = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ)
    return int(os.environ["WORLD_SIZE"]) if started else 1


def own() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process measures, saves and prints."""
    return own() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """While the context lasts, the processes of `torchrun` can share values and train; no effect with one process."""
    if count() == 1:
        yield
        return
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shared(value: Value) -> Value:
    """What the first process passes, on every process; others wait for it. The value itself with one process."""
    if count() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
