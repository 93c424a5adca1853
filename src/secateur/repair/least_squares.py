"""Least squares: the values of the kept weights that fit the inputs best, where what is kept is known.

Row by row, w_S = argmin (w0 - w)^T H (w0 - w) over weights that are zero outside the support S. The loop is
`secateur.repair.loops.refit`.
"""

from secateur.arrays import Array
from secateur.repair.forms import inner_loop
from secateur.repair.gram import Gram
from secateur.repair.problem import pose
from secateur.repair.start import Start, start_mask
from secateur.select import NM, Block, Element


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

    start: what is kept, as a bool mask (out, in), as a pruned weight (out, in), or as a method that returns one;
    SparseGPT when left out. Its zeros are the result's, so the count is as exact as the start's.
    tolerance: the residual, relative to the right-hand side, at which a row is done (default: 1e-3 in float32, 1e-10
    in float64).
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    mask, values = start_mask(problem, start, fast=fast)
    live = mask & ~problem.gram.dead[None, :]
    refit = inner_loop("refit", values, fast=fast)
    new = refit(values * problem.scale, problem.weight * problem.scale, problem.corr, live, tolerance)
    return problem.finish(new / problem.scale, mask)
