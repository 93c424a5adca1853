"""Mean activation of a unit: neurons that are rarely active are removed (Hu et al., 2016)."""

from secateur.arrays import Array


def activation(unit_act: Array) -> Array:
    """E|activation| over tokens where the unit is consumed, shape (units,)."""
    return unit_act
