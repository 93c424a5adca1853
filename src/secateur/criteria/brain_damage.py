"""Optimal brain damage with the diagonal empirical Fisher as the curvature (LeCun et al., 1989)."""

from secateur.arrays import Array


def brain_damage(weight: Array, grad_sq: Array) -> Array:
    """w^2 E[(dL/dw)^2] / 2, in the shape of the weight: the second-order loss of setting it to zero."""
    return weight**2 * grad_sq / 2
