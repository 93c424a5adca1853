"""Gram: the second moment of a layer's inputs, checked, damped, and factorised at most once.

Linears that read the same tensor share one gram; passing the same `Gram` to each call shares its factors too.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.arrays import Array, all_finite, namespace, to_numpy
from secateur.errors import DataError

DAMP = 0.01
"""Added to the diagonal, relative to its mean (Frantar and Alistarh, 2023)."""


@dataclass(frozen=True, eq=False)
class Gram:
    """A positive definite gram. `matrix` (in, in) is damped and symmetric; `dead` (in,) says which inputs are always
    zero: their rows and columns are zero but for the diagonal. `damping` is what was added to the diagonal.
    """

    matrix: Array
    dead: Array
    damping: float
    lower_reversed: Array
    """Cholesky factor, float64, of the matrix with both of its axes reversed."""

    @property
    def size(self) -> int:
        """Number of inputs."""
        return int(self.matrix.shape[0])

    @functools.cached_property
    def upper(self) -> Array:
        """The upper Cholesky factor U of the inverse, U^T U = matrix^-1, in float64.

        matrix = R R^T with R upper triangular comes from the Cholesky factor of the reversed matrix; U = R^-1.
        """
        xp = namespace(self.matrix)
        factor = xp.flip(xp.flip(self.lower_reversed, axis=0), axis=1)
        return _triangular_inverse(factor)

    @functools.cached_property
    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues (in,) and eigenvectors (in, in) of the matrix scaled to a unit diagonal, in float64."""
        xp = namespace(self.matrix)
        scale = self.scale
        scaled = xp.astype(self.matrix, xp.float64) / (scale[:, None] * scale[None, :])
        values, vectors = xp.linalg.eigh(scaled)
        return values, vectors

    @functools.cached_property
    def scale(self) -> Array:
        """Square root of the diagonal, float64 of shape (in,)."""
        xp = namespace(self.matrix)
        return xp.sqrt(xp.astype(xp.linalg.diagonal(self.matrix), xp.float64))


def prepare(gram: "Array | Gram", damp: float = DAMP, like: Array | None = None) -> Gram:
    """Check, damp and factorise a gram of shape (in, in); a `Gram` is passed through.

    damp: what is added to the diagonal, relative to the mean of the diagonal over living inputs. Where the result is
    not positive definite the damping grows tenfold until it is, and a RuntimeWarning says to what.
    like: the array whose library and device the result takes, where the gram has another one.

    Raises DataError when the gram is not square, not finite or has a negative diagonal.
    """
    if isinstance(gram, Gram):
        return gram
    gram = _like(gram, like)
    xp = namespace(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise DataError(f"a gram has shape (inputs, inputs), not {tuple(gram.shape)}")
    if not all_finite(gram):
        raise DataError("the gram is NaN or infinite; look for NaN or huge activations in the model on this data")
    wide = xp.astype(gram, xp.float64)
    wide = (wide + xp.matrix_transpose(wide)) / 2
    diagonal = xp.linalg.diagonal(wide)
    if bool(xp.any(diagonal < 0)):
        raise DataError(
            f"the gram has {float(xp.min(diagonal)):.3g} on its diagonal; sums of squares cannot be negative"
        )
    dead = diagonal == 0
    living = int(xp.sum(xp.astype(~dead, xp.int64)))
    mean = float(xp.sum(diagonal)) / living if living else 1.0
    alive = xp.astype(~dead, xp.float64)
    wide = wide * alive[:, None] * alive[None, :]
    eye = xp.eye(wide.shape[0], dtype=xp.float64, device=_device(wide))
    wide = wide + eye * xp.where(dead, xp.full_like(diagonal, mean), xp.zeros_like(diagonal))
    share, asked = damp, damp
    for _ in range(12):
        damped = wide + eye * (share * mean)
        try:
            factor = xp.linalg.cholesky(xp.flip(xp.flip(damped, axis=0), axis=1))
        except (RuntimeError, np.linalg.LinAlgError):
            share = max(share * 10, 1e-6)
            continue
        if share != asked:
            warnings.warn(
                f"the gram is not positive definite: {share * mean:.3g} ({share:.1e} of its mean diagonal) was added "
                "to its diagonal; more calibration tokens, or sums in float32 or better, avoid this",
                RuntimeWarning,
                stacklevel=3,
            )
        kept = damped if gram.dtype == xp.float64 else xp.astype(damped, xp.float32)
        return Gram(kept, dead, share * mean, factor)
    raise DataError("the gram is far from positive definite; it is no sum of x x^T")


def _device(array: Array) -> Any:
    from array_api_compat import device

    return device(array)


def _like(gram: Array, like: Array | None) -> Array:
    """The gram in the library and on the device of another array."""
    if like is None:
        return gram
    xp = namespace(like)
    if type(gram) is not type(like) and xp is not namespace(gram):
        gram = to_numpy(gram)
    return xp.asarray(gram, device=_device(like))


def _triangular_inverse(upper: Array, base: int = 64) -> Array:
    """Inverse of an upper triangular matrix by halves: [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1]."""
    xp = namespace(upper)
    size = upper.shape[0]
    if size <= base:
        return xp.linalg.inv(upper)
    half = size // 2
    a, c = _triangular_inverse(upper[:half, :half], base), _triangular_inverse(upper[half:, half:], base)
    corner = -(a @ upper[:half, half:] @ c)
    below = xp.zeros((size - half, half), dtype=upper.dtype, device=_device(upper))
    return xp.concat([xp.concat([a, corner], axis=1), xp.concat([below, c], axis=1)], axis=0)
