"""Exact 1-swaps: a kept weight gives its place to a pruned one that lowers the loss more, until no such swap is left.

In the scale where the gram has a unit diagonal, C: with v the weights of a row and r = (v0 - v) C, dropping q and
taking p in at its best value lowers the loss by (r_p + v_q C_qp)^2 and raises it by (v_q + r_q)^2 over that of v_q at
its own best value. For an N:M pattern each group takes the best of all its patterns, at their jointly best values
(block coordinate descent). Every step lowers the loss, so the result is never worse than the start. The loop is
`secateur.repair.loops.swap_pass`.
"""

from secateur.arrays import Array
from secateur.repair.forms import inner_loop
from secateur.repair.gram import Gram
from secateur.repair.loops import default_tolerance
from secateur.repair.problem import pose
from secateur.repair.start import Start, start_mask
from secateur.select import NM, Block, Element


def swaps(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    start: Start = None,
    damp: float | None = None,
    passes: int = 2,
    tolerance: float | None = None,
    fast: bool = True,
) -> Array:
    """Refine what is kept of a weight (out, in), and its values; see `secateur.repair` for arguments and errors.

    start: a bool mask, a pruned weight, or a method that returns one; SparseGPT when left out. The number of zeros of
    each row (of blocks), and of each N:M group, stays as it is.
    passes: most passes; each looks at every kept weight once, after a least squares fit, and the last is the one that
    changes nothing. After enough of them no single swap lowers the loss; two get within a percent of that.
    tolerance: of the least squares fits (default: that of `least_squares`, and tenfold between passes).
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    xp, scale, corr, dead = problem.xp, problem.scale, problem.corr, problem.gram.dead
    mask, values = start_mask(problem, start, fast=fast)
    refit = inner_loop("refit", values, fast=fast)
    swap_pass = inner_loop("swap_pass", values, fast=fast)
    dense, values = problem.weight * scale, xp.where(dead[None, :], xp.zeros_like(values), values * scale)
    live = ~dead[None, :]
    between = 10 * default_tolerance(values) if tolerance is None else tolerance
    for _ in range(passes):
        values = refit(values, dense, corr, mask & live, between)
        values, mask, changed = swap_pass(values, dense, corr, mask, dead, pattern)
        if not changed:
            break
    values = refit(values, dense, corr, mask & live, tolerance)
    return problem.finish(values / scale, mask)
