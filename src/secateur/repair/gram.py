"""Gram: the second moment of a layer's inputs, checked, damped, and factorised at most once.

Linears that read the same tensor share one gram; passing the same `Gram` to each call shares its factors too.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, all_finite, namespace, to_numpy
from secateur.errors import DataError, PlanError
from secateur.repair.forms import inner_loop
from secateur.repair.loops import with_diagonal

WIDE_INPUTS = 4096
"""Grams of more inputs than this are factorised in their own type, others in float64."""

DAMP = 0.01
"""Added to the diagonal, relative to its mean (Frantar and Alistarh, 2023)."""


@dataclass(frozen=True, eq=False)
class Gram:
    """The gram of one tensor that linear layers read, as `prepare` makes it.

    given (in, in): the gram as it was collected.
    damp: what is added to the diagonal, relative to its mean.
    squares (in,): the diagonal, which is the mean square of each input, in float64.
    dead (in,): which inputs are always zero.
    """

    given: Array
    damp: float
    squares: Array
    dead: Array

    @property
    def size(self) -> int:
        """Number of inputs."""
        return int(self.given.shape[0])

    def damped(self, damp: float) -> "Gram":
        """The gram with another damping; each damping is made once, so that its factors are shared too."""
        if damp == self.damp:
            return self
        by_damping: dict[float, Gram] = self.__dict__.setdefault("_by_damping", {})
        return by_damping.setdefault(damp, Gram(self.given, damp, self.squares, self.dead))

    @property
    def wide(self) -> Any:
        """The type in which the gram is factorised: float64, or its own where it is large and memory counts."""
        xp = namespace(self.given)
        return self.given.dtype if self.size > WIDE_INPUTS else xp.float64

    @property
    def matrix(self) -> Array:
        """The damped, positive definite gram (in, in); rows of dead inputs are zero beside the diagonal."""
        return with_diagonal(self.given, self._diagonal(self.damping), self.dead)

    @functools.cached_property
    def damping(self) -> float:
        """What is added to the diagonal."""
        return self._factor[1]

    def _diagonal(self, damping: float) -> Array:
        """The diagonal of the damped matrix, in the wide type."""
        xp = namespace(self.given)
        filled = xp.where(self.dead, xp.full_like(self.squares, self._mean), self.squares)
        return xp.astype(filled + damping, self.wide)

    @functools.cached_property
    def _factor(self) -> tuple[Array, float]:
        """Cholesky factor of the damped matrix with both of its axes reversed, and the damping that was needed."""
        reversed_factor = inner_loop("reversed_factor", self.given)
        share = self.damp
        for _ in range(14):
            try:
                factor = reversed_factor(self.given, self._diagonal(share * self._mean), self.dead)
            except (RuntimeError, np.linalg.LinAlgError):
                share = max(share * 10, 1e-9)
                continue
            if share != self.damp:
                warnings.warn(
                    f"the gram is not positive definite: {share * self._mean:.3g} ({share:.1e} of its mean diagonal) "
                    "was added to its diagonal; more calibration tokens, or sums in float32 or better, avoid this",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return factor, share * self._mean
        raise DataError("the gram is far from positive definite; it is no sum of x x^T")

    @property
    def _mean(self) -> float:
        """Mean of the diagonal over inputs that are not dead; 1 where all are."""
        xp = namespace(self.given)
        living = self.size - int(xp.sum(xp.astype(self.dead, xp.int64)))
        return float(xp.sum(self.squares)) / living if living else 1.0

    @functools.cached_property
    def upper(self) -> Array:
        """The upper Cholesky factor U (in, in) of the inverse: U^T U = matrix^-1.

        matrix = R R^T with R upper triangular comes from the Cholesky factor of the reversed matrix; U = R^-1.
        """
        factor, self.__dict__["damping"] = self._factor
        del self.__dict__["_factor"]
        triangular_inverse = inner_loop("triangular_inverse", factor)
        return triangular_inverse(namespace(factor).flip(factor, axis=(0, 1)))

    @functools.cached_property
    def scale(self) -> Array:
        """Square root of the diagonal of the matrix, of shape (in,)."""
        return namespace(self.given).sqrt(self._diagonal(self.damping))

    @functools.cached_property
    def correlation(self) -> Array:
        """The matrix scaled to a unit diagonal, (in, in)."""
        return self.matrix / (self.scale[:, None] * self.scale[None, :])


def prepare(gram: "Array | Gram", damp: float | None = None, like: Array | None = None) -> Gram:
    """Check a gram of shape (in, in), or change the damping of a `Gram`. Factors are computed when a method needs them.

    damp: what is added to the diagonal, relative to the mean of the diagonal over inputs that are not dead; None for
    what a `Gram` has, and `DAMP` for an array. Where the result is not positive definite the damping grows tenfold
    until it is, and a RuntimeWarning says to what.
    like: the array whose library and device the result takes, where the gram has another one.

    Raises DataError when the gram is not square, not finite or has a negative diagonal, PlanError for a damping that is
    no number from 0 upwards.
    """
    if damp is not None and not (isinstance(damp, int | float) and 0 <= damp < float("inf")):
        raise PlanError(f"damp {damp!r} is no number from 0 upwards; 0.01 adds a hundredth of the mean diagonal")
    if isinstance(gram, Gram):
        return gram if damp is None else gram.damped(damp)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise DataError(f"a gram has shape (inputs, inputs), not {tuple(gram.shape)}")
    gram = _like(gram, like)
    if not all_finite(gram):
        raise DataError("the gram is NaN or infinite; look for NaN or huge activations of the model on this data")
    xp = namespace(gram)
    if gram.dtype != xp.float64:
        gram = xp.astype(gram, xp.float32)
    squares = xp.astype(xp.linalg.diagonal(gram), xp.float64)
    lowest = float(xp.min(squares))
    if lowest < 0:
        raise DataError(f"the gram has {lowest:.3g} on its diagonal; a sum of squares cannot be negative")
    return Gram(gram, DAMP if damp is None else damp, squares, squares == 0)


def _like(gram: Array, like: Array | None) -> Array:
    """The gram in the library and on the device of the array `like`, where there is one."""
    if like is None:
        return gram
    xp = namespace(like)
    if type(gram) is not type(like) and xp is not namespace(gram):
        gram = to_numpy(gram)
    return xp.asarray(gram, device=device(like))
