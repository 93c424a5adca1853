"""First-order Taylor expansion of the loss, |w dL/dw|: what setting a weight to zero would change (Mozer and
Smolensky, 1989; Molchanov et al., 2017)."""

from secateur.arrays import Array


def taylor(weight: Array, grad: Array) -> Array:
    """w dL/dw, signed, in the shape of the weight: one weight scores |w g|, a unit |sum over the unit of w g|."""
    return weight * grad
