"""Candidate: how many units of each axis stay, and which layers go, without saying yet which units these are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.cost import layer_of_axes

__all__ = ["Candidate", "layer_of_axes"]


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
