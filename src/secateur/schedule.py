"""Schedules: training step -> sparsity."""

from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(sparsity: float) -> Schedule:
    """The same sparsity at every step."""
    return lambda step: sparsity


def linear(end: float, steps: int, start: float = 0.0, begin: int = 0) -> Schedule:
    """From `start` at step `begin` to `end`, `steps` later, in equal increments."""
    return lambda step: start + (end - start) * _progress(step, begin, steps)


def cubic(end: float, steps: int, start: float = 0.0, begin: int = 0) -> Schedule:
    """end + (start - end) (1 - progress)^3: fast while there is much to lose, slow at the end (Zhu and Gupta, 2017)."""
    return lambda step: end + (start - end) * (1 - _progress(step, begin, steps)) ** 3


def _progress(step: int, begin: int, steps: int) -> float:
    return min(max((step - begin) / steps, 0.0), 1.0) if steps > 0 else float(step >= begin)
