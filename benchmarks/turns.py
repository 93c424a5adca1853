"""Times taken in turns on a machine that others share: turns in which someone else was on the core do not count.

A turn counts when a product that stays in L1, just before it and just after it, takes at most `SLACK` longer than it
ever took. Whatever slows that product (a neighbour on the sibling of a core, a lower clock) slows what is measured, and
not all sides alike: a neighbour takes half of L1, which a kernel that lives in it feels more than one that streams.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

Run = Callable[[], object]
SLACK = 0.08
PATIENCE = 20
"""A measurement ends after this many times its seconds at the latest, with the turns that then count; it waits for a
quiet moment to begin a turn."""

_a, _b, _c = torch.ones(64, 64), torch.ones(64, 64), torch.empty(64, 64)
_best = float("inf")


def undisturbed() -> bool:
    """Whether the machine is as fast now as at its best so far, by a product of 6 microseconds."""
    global _best
    took = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(_a, _b, out=_c)
        took = min(took, time.perf_counter() - start)
    _best = min(_best, took)
    return took <= _best * (1 + SLACK)


@functools.cache
def look_first(seconds: float = 2.0) -> None:
    """Learn how fast the machine is at its best, once a process."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        undisturbed()


def samples_us(runs: dict[str, Run], seconds: float, least: int = 7, warm: int = 2) -> dict[str, np.ndarray]:
    """Times of each run in microseconds, taken in turns for about `seconds` in all and until `least` turns count, after
    `warm` runs that do not. Where too few count (the machine was not quiet), all do, and it is said."""
    kept: list[list[float]] = []
    rest: list[list[float]] = []
    for run in runs.values():
        for _ in range(warm):
            run()
    look_first()
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < PATIENCE * seconds or len(rest) + len(kept) < least:
        if spent > seconds and len(kept) >= least:
            break
        before, turn = undisturbed(), []
        latest = time.perf_counter() + seconds
        while not before and time.perf_counter() < latest:
            time.sleep(0.01)
            before = undisturbed()
        for run in runs.values():
            began = time.perf_counter()
            run()
            turn.append((time.perf_counter() - began) * 1e6)
        (kept if before and undisturbed() else rest).append(turn)
    if len(kept) < least:
        print(f"only {len(kept)} of {len(kept) + len(rest)} turns were undisturbed", flush=True)
    used = np.array(kept if len(kept) >= least else rest + kept)
    return dict(zip(runs, used.T, strict=True))


def medians_us(runs: dict[str, Run], seconds: float, least: int = 7, warm: int = 2) -> dict[str, float]:
    """The medians of `samples_us`."""
    return {name: float(np.median(took)) for name, took in samples_us(runs, seconds, least, warm).items()}
