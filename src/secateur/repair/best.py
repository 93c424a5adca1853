"""The composition of the methods that loses least on one layer at a bounded cost."""

from secateur.arrays import Array
from secateur.repair.alps import alps
from secateur.repair.gram import Gram
from secateur.repair.problem import pose
from secateur.repair.swaps import swaps
from secateur.select import NM, Block, Element


def best(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    damp: float | None = None,
    growth: float = 1.05,
    fast: bool = True,
) -> Array:
    """SparseGPT, then ALPS from it with a slow penalty, then one pass of exact swaps and least squares.

    See `secateur.repair` for arguments and errors, and `alps` for `growth`. Counts over the matrix.
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    start = alps(problem.weight, problem.gram, pattern, sparsity, growth=growth, tolerance=1e-2, fast=fast)
    new = swaps(problem.weight, problem.gram, pattern, sparsity, start=start, passes=1, fast=fast)
    return problem.xp.astype(new, weight.dtype)
