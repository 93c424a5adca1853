"""Gradient magnitude, |dL/dw|: weights that do not change the loss are removed (Karnin, 1990, in its simplest form)."""

from secateur.arrays import Array, namespace


def gradient(grad: Array) -> Array:
    """|dL/dw| of the mean loss over the data, in the shape of the weight."""
    return namespace(grad).abs(grad)
