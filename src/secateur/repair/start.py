"""The start of a method: a mask, a pruned weight, or another method."""

from collections.abc import Callable
from typing import Any, TypeAlias

from secateur.arrays import Array, namespace
from secateur.errors import PlanError
from secateur.repair.problem import Problem
from secateur.repair.sparsegpt import sparsegpt
from secateur.select import NM, Block

Start: TypeAlias = Array | Callable[..., Array] | None
"""A bool mask (out, in) of what is kept, a pruned weight (out, in), or a method that returns one; None: SparseGPT."""


def start_mask(problem: Problem, start: Start, *, fast: bool = True) -> tuple[Array, Array]:
    """The mask that `start` means, and values to begin with: those of `start`, or of the dense weight for a mask.

    Raises PlanError when `start` has another shape than the weight, or keeps what the pattern does not allow.
    """
    xp = problem.xp
    array: Array = start
    if start is None:
        array = sparsegpt(problem.weight, problem.gram, problem.pattern, problem.asked, fast=fast)
    elif callable(start):
        array = start(problem.weight, problem.gram, problem.pattern, problem.asked)
    if tuple(array.shape) != tuple(problem.weight.shape):
        raise PlanError(f"start has shape {tuple(array.shape)}, the weight {tuple(problem.weight.shape)}")
    mask = array if array.dtype == xp.bool else array != 0
    if isinstance(problem.pattern, Block):
        mask = _whole_blocks(mask, problem.pattern)
    elif isinstance(problem.pattern, NM):
        groups = xp.reshape(xp.astype(mask, xp.int64), (*mask.shape[:1], -1, problem.pattern.of))
        most = int(xp.max(xp.sum(groups, axis=-1)))
        if most > problem.pattern.keep:
            raise PlanError(f"start keeps {most} of {problem.pattern.of} somewhere, which is not {problem.pattern}")
    values = problem.weight if array.dtype == xp.bool else xp.astype(array, problem.weight.dtype)
    return mask, values


def _whole_blocks(mask: Array, pattern: Any) -> Array:
    """The mask with every block kept of which some weight is kept (a kept weight may be zero by chance)."""
    xp = namespace(mask)
    out, inputs = mask.shape
    shape = (out // pattern.rows, pattern.rows, inputs // pattern.columns, pattern.columns)
    kept = xp.any(xp.reshape(mask, shape), axis=(1, 3), keepdims=True)
    return xp.reshape(xp.broadcast_to(kept, shape), mask.shape)
