"""SparseGPT: optimal brain surgery, one column at a time (Frantar and Alistarh, 2023).

With U the upper Cholesky factor of the inverse gram, the score of a weight is w^2 / U_jj^2. Columns are taken from
left to right: a pruned weight w_j leaves the error e = w_j / U_jj, and the columns behind it take -e U_j,: . The loop
is `secateur.repair.loops.sweep`.
"""

from secateur.arrays import Array
from secateur.repair.forms import inner_loop
from secateur.repair.gram import Gram
from secateur.repair.problem import pose
from secateur.select import NM, Block, Element


def sparsegpt(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    damp: float | None = None,
    columns: int = 128,
    fast: bool = True,
) -> Array:
    """Prune and mend a weight (out, in); see `secateur.repair` for arguments and errors.

    damp: what is added to the diagonal of the gram, relative to its mean.
    columns: how many columns choose together what goes, rounded to whole groups or blocks.
    fast: False takes the pure form, which is slow and plain.
    Counts over the matrix: element and block patterns give each band of `columns` its share, over all rows, and the
    shares add up to round(sparsity * number of weights or blocks) zeros.
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    sweep = inner_loop("sweep", weight, fast=fast)
    xp = problem.xp
    upper = xp.astype(problem.gram.upper, problem.weight.dtype)
    step = pattern.of if isinstance(pattern, NM) else problem.grid[1]
    band = max(step, columns // step * step)
    new, mask = sweep(problem.weight, upper, problem.gram.dead, pattern, problem.sparsity, band)
    return problem.finish(new, mask)
