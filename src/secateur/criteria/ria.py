"""RIA: relative importance and activations (Zhang et al., 2024)."""

from secateur.arrays import Array, namespace


def ria(weight: Array, act_sq: Array, power: float = 0.5) -> Array:
    """(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) (E[x_j^2])^(power / 2), in the shape of the weight (..., a, b).

    The sums run over the column and the row of each weight, so that no row or column is emptied; they are the same for
    a weight stored transposed. `act_sq` broadcasts along its inputs. Scores are comparable within one weight.
    """
    xp = namespace(weight)
    size = xp.abs(weight)
    tiny = xp.finfo(size.dtype).smallest_normal
    down = xp.sum(size, axis=-2, keepdims=True) + tiny
    across = xp.sum(size, axis=-1, keepdims=True) + tiny
    return (size / down + size / across) * act_sq ** (power / 2)
