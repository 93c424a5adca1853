"""Least squares: the best values of the kept weights on the inputs that were seen, given which ones are kept.

Row by row, w_S = argmin (w0 - w)^T H (w0 - w) over weights that are zero outside the support S.
"""

from typing import Any

from secateur.arrays import Array, namespace
from secateur.repair.forms import fast_form
from secateur.repair.gram import Gram
from secateur.repair.problem import Problem, pose
from secateur.repair.start import Start, start_mask
from secateur.select import NM, Block, Element

STEPS = 200
"""Most steps of conjugate gradients."""


def least_squares(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    start: Start = None,
    damp: float | None = None,
    tolerance: float | None = None,
    fast: bool = True,
) -> Array:
    """Refit the kept weights of (out, in); see `secateur.repair` for arguments and errors.

    start: what is kept, as a bool mask (out, in), as a pruned weight (out, in), or as a method that gives one;
    SparseGPT when left out. Its zeros are the result's, so the count is as exact as the start's.
    tolerance: the residual, relative to the right-hand side, at which a row is done (default: 1e-3 in float32, 1e-10
    in float64).
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    mask, values = start_mask(problem, start, fast)
    return problem.finish(refit_weight(problem, values, mask, tolerance, fast), mask)


def refit_weight(
    problem: Problem, values: Array, mask: Array, tolerance: float | None = None, fast: bool = True
) -> Array:
    """`refit` in the scale of the weight itself."""
    xp = problem.xp
    scale = xp.astype(problem.gram.scale, problem.weight.dtype)
    corr = xp.astype(problem.gram.correlation, problem.weight.dtype)
    live = mask & ~problem.gram.dead[None, :]
    loop = (fast_form("refit", values) if fast else None) or refit
    new = loop(values * scale[None, :], problem.weight * scale[None, :], corr, live, tolerance)
    return new / scale[None, :]


def default_tolerance(array: Array) -> float:
    """When conjugate gradients stop. The loss above its minimum is of second order in it: about 1e-6 in float32."""
    xp = namespace(array)
    return 1e-10 if array.dtype == xp.float64 else 1e-3


def refit(
    values: Array, dense: Array, corr: Array, mask: Array, tolerance: float | None = None, steps: int = STEPS
) -> Array:
    """The minimiser of each row over its support, by conjugate gradients on all rows at once.

    values: where to start (out, in); dense: the weight to match (out, in); corr (in, in) with a unit diagonal.
    """
    xp = namespace(values)
    keep = xp.astype(mask, values.dtype)
    tolerance = default_tolerance(values) if tolerance is None else tolerance
    values = values * keep
    goal = tolerance**2 * xp.sum((keep * (dense @ corr)) ** 2, axis=1)
    left = keep * ((dense - values) @ corr)
    size = xp.sum(left**2, axis=1)
    direction = left
    for _ in range(steps):
        busy = size > goal
        if not bool(xp.any(busy)):
            break
        image = keep * (direction @ corr)
        step = _ratio(size, xp.sum(direction * image, axis=1), busy)
        values = values + step[:, None] * direction
        left = left - step[:, None] * image
        after = xp.sum(left**2, axis=1)
        direction = left + _ratio(after, size, busy)[:, None] * direction
        size = after
    return values


def _ratio(above: Array, below: Array, busy: Array) -> Any:
    """above / below in rows that are still busy, else 0."""
    xp = namespace(above)
    good = busy & (below > 0)
    return xp.where(good, above, xp.zeros_like(above)) / xp.where(good, below, xp.ones_like(below))
