"""Diagonal Fisher information of a gate on each unit (Michel et al., 2019; Kwon et al., 2022)."""

from secateur.arrays import Array


def fisher(unit_grad_sq: Array) -> Array:
    """Mean over batches of (dL/d gate)^2, shape (units,): the second-order loss of closing the gate."""
    return unit_grad_sq
