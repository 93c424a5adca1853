"""One line on the axes of a model and on what a plan removes, for the `repr` of layouts, plans and hosts."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from secateur.layout import Axis

MOST = 8
"""How many groups of axes a line names."""


def of_axes(axes: Iterable["Axis"]) -> str:
    """The axes by kind, such as `head 12 x 12, hidden 1 x 768 (frozen)`: how many axes, of how many units."""
    groups: dict[str, list[Axis]] = {}
    for axis in axes:
        groups.setdefault(f"{axis.kind} (frozen)" if axis.frozen else axis.kind, []).append(axis)
    return _joined([_of_group(name, [axis.size for axis in group]) for name, group in groups.items()]) or "no axes"


def _of_group(name: str, sizes: list[int]) -> str:
    word, _, frozen = name.partition(" ")
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)}..{max(sizes)}"
    return f"{word} {len(sizes)} x {span}{' ' + frozen if frozen else ''}"


def of_plan(
    keep: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], sizes: Mapping[str, int], repaired: int
) -> str:
    """What a plan removes: units by the last part of their axis's name, and single weights.

    repaired: how many parameters get new weights.
    """
    groups: dict[str, list[str]] = {}
    for name in keep:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    parts = []
    for word, names in groups.items():
        kept = sum(len(keep[name]) for name in names)
        known = all(name in sizes for name in names)
        total = sum(sizes[name] for name in names if name in sizes)
        parts.append(f"{total - kept} of {total} {word}" if known else f"all but {kept} {word}")
    if masks:
        total = sum(mask.size for mask in masks.values())
        gone = total - sum(int(np.count_nonzero(mask)) for mask in masks.values())
        parts.append(f"{gone:,} of {total:,} weights in {len(masks)} parameters")
    text = f"removes {_joined(parts) or 'nothing'}"
    return f"{text}; {repaired} parameters repaired" if repaired else text


def _joined(parts: list[str]) -> str:
    more = [f"{len(parts) - MOST} more"] if len(parts) > MOST else []
    return ", ".join([*parts[:MOST], *more])
