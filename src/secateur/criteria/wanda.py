"""Wanda: weight magnitude times the norm of its input (Sun et al., 2024)."""

from secateur.arrays import Array, namespace


def wanda(weight: Array, act_sq: Array) -> Array:
    """|w_ij| sqrt(E[x_j^2]), in the shape of the weight; `act_sq` broadcasts along its inputs."""
    xp = namespace(weight)
    return xp.abs(weight) * xp.sqrt(act_sq)
