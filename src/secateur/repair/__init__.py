"""Repair: prunes one linear layer, and changes the weights that stay so that its output on its inputs changes least.

Every method is a function `method(weight, gram, pattern, sparsity=None, **options) -> new weight`:

- weight (out, in), gram (in, in) = sum of x x^T over tokens divided by their number, float32 or better; both numpy
  arrays or torch tensors. The result has the shape and type of the weight, and pruned entries are exactly zero.
- pattern: `Element()`, `NM(keep, of)` or `Block(rows, columns)`; sparsity: the fraction of zeros, None for N:M.
  A stated number of zeros is met to the last weight; each method says whether it counts per row or over the matrix.
- gram may be a `Gram` (see `prepare`), so that linears that read the same tensor factorise it once. Methods that take
  `damp` add that to the diagonal, relative to its mean; None leaves the damping of a `Gram`, and is 0.01 for an array.

Raises PlanError for a pattern or sparsity that cannot be met, DataError for a gram that is not finite or does not fit
and ModelError for weights that are not finite. A gram that is not positive definite is damped, and a warning says by
how much. The loss of a layer is `layer_loss`: the mean over tokens of |W x - W' x|^2.
"""

from secateur.repair.alps import alps
from secateur.repair.best import best
from secateur.repair.gram import Gram, prepare
from secateur.repair.least_squares import least_squares
from secateur.repair.plain import by_criterion, magnitude, ria, wanda
from secateur.repair.problem import layer_loss
from secateur.repair.sparsegpt import sparsegpt
from secateur.repair.swaps import swaps

__all__ = [
    "Gram",
    "alps",
    "best",
    "by_criterion",
    "layer_loss",
    "least_squares",
    "magnitude",
    "prepare",
    "ria",
    "sparsegpt",
    "swaps",
    "wanda",
]
