"""Weight magnitude, |w|: small weights are removed (Janowsky, 1989; Han et al., 2015)."""

from secateur.arrays import Array, namespace


def magnitude(weight: Array) -> Array:
    """|w|, in the shape of the weight; over a unit it sums to the L1 norm."""
    return namespace(weight).abs(weight)


def threshold(weight: Array, tau: float) -> Array:
    """The textbook form: w where |w| > tau, else 0; shape and type of the weight."""
    xp = namespace(weight)
    return xp.where(xp.abs(weight) > tau, weight, xp.zeros_like(weight))
