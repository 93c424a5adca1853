"""Candidate: how many units of each axis stay, and which layers go, without saying yet which units these are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.layout import Layout


@dataclass(frozen=True)
class Candidate:
    """Sizes of a smaller model.

    kept: axis -> number of units that stay; axes without an entry are whole. No axis inside a dropped layer is named.
    dropped: axis of layers -> the layers that go, ascending.
    densities: linear weight -> the share of its single weights that stay, where zeros are searched too.
    """

    kept: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    densities: Mapping[str, float] = field(default_factory=dict)


def layer_of_axes(layout: Layout) -> dict[str, tuple[str, int]]:
    """Axis -> (axis of layers, layer) for each axis whose parameters all lie in one element of a list of layers."""
    found: dict[str, tuple[str, int]] = {}
    for outer in layout.of_kind("layer", prunable=False):
        for axis in layout.axes.values():
            layers = {layout.member_of(param, outer.name) for param in layout.members(axis.name)}
            if axis.name != outer.name and len(layers) == 1 and None not in layers:
                found[axis.name] = (outer.name, next(layer for layer in layers if layer is not None))
    return found
