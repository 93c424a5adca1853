"""What every method does before and after its own idea: checks, working precision, exact zeros."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, all_finite, namespace, to_numpy
from secateur.budget import check_sparsity
from secateur.errors import DataError, ModelError, PlanError
from secateur.repair.gram import Gram, prepare
from secateur.select import NM, Block, Element


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer to prune.

    weight (out, in): in float32 or float64.
    gram: of its inputs.
    pattern, sparsity: what may stay; the sparsity that the pattern means, for N:M.
    original (out, in): the weight in the type in which it came.
    """

    weight: Array
    gram: Gram
    pattern: Element | NM | Block
    sparsity: float
    original: Array

    @property
    def xp(self) -> Any:
        """The array namespace of the weight."""
        return namespace(self.weight)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of what is chosen or removed whole: those of a block, else (1, 1)."""
        return (self.pattern.rows, self.pattern.columns) if isinstance(self.pattern, Block) else (1, 1)

    @property
    def asked(self) -> float | None:
        """The sparsity as an argument of a method: None for N:M."""
        return None if isinstance(self.pattern, NM) else self.sparsity

    @property
    def zeros(self) -> int:
        """Number of weights (or blocks) to prune; of no meaning for N:M."""
        rows, columns = self.grid
        out, inputs = self.weight.shape
        return round((out // rows) * (inputs // columns) * self.sparsity)

    @property
    def scale(self) -> Array:
        """Square root of the diagonal of the gram, (1, in), in the type of the weight."""
        return self.xp.astype(self.gram.scale, self.weight.dtype)[None, :]

    @property
    def corr(self) -> Array:
        """The gram scaled to a unit diagonal, (in, in), in the type of the weight."""
        return self.xp.astype(self.gram.correlation, self.weight.dtype)

    def finish(self, weight: Array, mask: Array) -> Array:
        """The weight with exact zeros outside the mask, in the type of the original; dead inputs keep their weights."""
        xp = self.xp
        if bool(xp.any(self.gram.dead)):
            weight = xp.where(self.gram.dead[None, :], self.weight, weight)
        weight = xp.astype(weight, self.original.dtype, copy=False)
        return xp.where(mask, weight, xp.zeros_like(weight))

    def array(self, values: np.ndarray) -> Array:
        """A numpy array in the library and on the device of the weight."""
        return self.xp.asarray(values, device=device(self.weight))


def pose(
    weight: Array, gram: "Array | Gram", pattern: Any, sparsity: float | None, damp: float | None = None
) -> Problem:
    """Check the arguments of a method; see `secateur.repair` for what it raises."""
    if weight.ndim != 2:
        raise ModelError(f"repair works on a weight of shape (out, in), not {tuple(weight.shape)}")
    if not all_finite(weight):
        raise ModelError("the weight holds NaN or infinity; mend the model before pruning it")
    xp = namespace(weight)
    wide = xp.float64 if weight.dtype == xp.float64 else xp.float32
    prepared = prepare(gram, damp, like=weight)
    if prepared.size != weight.shape[1]:
        raise DataError(f"the gram is of {prepared.size} inputs, the weight has {weight.shape[1]}")
    return Problem(
        xp.astype(weight, wide, copy=False), prepared, pattern, check_pattern(weight.shape, pattern, sparsity), weight
    )


def check_pattern(shape: tuple[int, ...], pattern: Any, sparsity: float | None) -> float:
    """The fraction of zeros that a pattern and a sparsity mean; PlanError when a weight of `shape` cannot meet them."""
    out, inputs = shape
    if isinstance(pattern, NM):
        if inputs % pattern.of:
            raise PlanError(f"the weight has {inputs} inputs, not a multiple of {pattern.of}; use another pattern")
        share = 1 - pattern.keep / pattern.of
        if sparsity is not None and abs(sparsity - share) > 1e-9:
            raise PlanError(f"pattern {pattern} is its own budget ({share:g} zeros); leave out sparsity {sparsity}")
        return share
    if isinstance(pattern, Block):
        if out % pattern.rows or inputs % pattern.columns:
            raise PlanError(f"the weight is {out} x {inputs}, which blocks of {pattern} do not divide; choose others")
    elif not isinstance(pattern, Element):
        raise PlanError(f"repair prunes single weights, N:M groups or blocks, not {pattern}")
    if sparsity is None:
        raise PlanError(f"pattern {pattern} needs a sparsity")
    return check_sparsity(sparsity)


def layer_loss(weight: Array, new: Array, gram: Array) -> float:
    """Mean over tokens of |W x - W' x|^2 = tr((W - W') H (W - W')^T), in float64.

    weight, new: (out, in); gram: (in, in), or a `Gram`, of which the damped matrix is taken.
    """
    matrix = gram.matrix if isinstance(gram, Gram) else gram
    change = to_numpy(weight).astype(np.float64) - to_numpy(new).astype(np.float64)
    return float(np.sum((change @ to_numpy(matrix).astype(np.float64)) * change))
