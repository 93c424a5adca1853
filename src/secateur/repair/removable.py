"""Which axes can lose units in one shot, which weights read them, and which weight makes up for the units that go."""

from collections.abc import Iterator
from dataclasses import dataclass

from secateur.dims import names
from secateur.layout import Axis, Layout

FIRST = ("head", "kv", "ffn", "expert")
"""Kinds that are looked at first: another axis in the same weight is left whole."""


@dataclass(frozen=True)
class Removable:
    """One axis whose units can go.

    readers: the linear weights behind its units: a gate on a unit scales what these weights read of it.
    weight: the only reader, where it is a matrix: it can make up for the units that go. None where nothing can.
    """

    axis: str
    readers: tuple[str, ...]
    weight: str | None = None


def removable(layout: Layout) -> tuple[dict[str, Removable], dict[str, str]]:
    """Axes whose units can go, by name; and for each other axis, but those of layers, a sentence that says why not."""
    found: dict[str, Removable] = {}
    notes: dict[str, str] = {}
    taken: dict[str, str] = {}
    for axis in _ordered(layout):
        readers = tuple(_readers(layout, axis))
        reason = _reason(axis, readers, taken)
        if reason is not None:
            notes[axis.name] = reason
            continue
        if axis.kind == "expert":
            found[axis.name] = Removable(axis.name, readers)
            continue
        taken |= dict.fromkeys(readers, axis.name)
        is_matrix = len(readers) == 1 and len(layout.params[readers[0]]) == 2
        found[axis.name] = Removable(axis.name, readers, readers[0] if is_matrix else None)
    return {name: found[name] for name in layout.axes if name in found}, notes


def _ordered(layout: Layout) -> Iterator[Axis]:
    """All axes but those of layers, those of the first kinds first."""
    axes = [axis for axis in layout.axes.values() if axis.kind != "layer"]
    yield from (axis for axis in axes if axis.kind in FIRST)
    yield from (axis for axis in axes if axis.kind not in FIRST)


def _reason(axis: Axis, readers: tuple[str, ...], taken: dict[str, str]) -> str | None:
    """Why an axis stays whole, or None."""
    if axis.frozen:
        return f"{axis.name} stays whole, as it is frozen: {axis.frozen}"
    if axis.kind in ("hidden", "vocab"):
        return f"{axis.name} stays whole, as every layer shares it and no single weight can make up for it"
    if axis.parts:
        return f"{axis.name} is searched through {axis.parts[0]}, whose units hold its own"
    if axis.size < 2:
        return f"{axis.name} has one unit, which has to stay"
    if not readers:
        return f"{axis.name} stays whole, as no weight reads it"
    if axis.kind != "expert" and (other := next((taken[name] for name in readers if name in taken), None)) is not None:
        return f"{axis.name} stays whole, as its units lie across those of {other}, which is searched"
    return None


def _readers(layout: Layout, axis: Axis) -> Iterator[str]:
    """The linear weights that read an axis; of experts, the weights that make their outputs."""
    for name, linear in layout.linears.items():
        if axis.kind != "expert":
            if layout.reads(name, axis.name):
                yield name
            continue
        inside = layout.member_of(name, axis.name) is not None or layout.carries(name, axis.name)
        read = {layout.axis(part).kind for dim in linear.contracted for part in names(layout.params[name][dim])}
        if inside and read and "hidden" not in read:
            yield name
