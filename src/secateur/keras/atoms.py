"""Atoms: axes before they have names. Every dimension of a tensor is a product of atoms and plain numbers; atoms that
meet in an operation become one by union-find.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

RANK = {
    "hidden": 9,
    "classes": 8,
    "vocab": 7,
    "kv": 6,
    "head": 6,
    "group": 6,
    "qk": 5,
    "v": 5,
    "channel": 4,
    "ffn": 1,
    "position": 0,
}
"""Where atoms of two kinds meet, the axis takes the kind with the higher number."""


@dataclass(eq=False)
class Atom:
    """One axis, or a part of one until it is joined.

    depth: how many attention layers come before it.
    frozen: why it cannot be pruned, or None.
    joined: the atom that it has become one with, or None.
    """

    size: int
    kind: str
    depth: int
    frozen: str | None = None
    joined: "Atom | None" = field(default=None, repr=False)

    def root(self) -> "Atom":
        """The atom that stands for all atoms joined with this one."""
        atom = self
        while atom.joined is not None:
            atom = atom.joined
        return atom


Factor: TypeAlias = int | Atom | None
Factors: TypeAlias = tuple[Factor, ...]
Value: TypeAlias = tuple[Factors, ...]
"""What is known of a tensor: for each dimension the factors of its extent, None where the extent is open."""


def plain(shape: tuple[int | None, ...]) -> Value:
    """A tensor whose dimensions carry no axis."""
    return tuple((n,) for n in shape)


def atoms_in(factors: Factors) -> list[Atom]:
    """The atoms of one dimension, each as its root."""
    return [factor.root() for factor in factors if isinstance(factor, Atom)]


def freeze(factors: Factors, reason: str) -> None:
    """Note of every atom of a dimension why it cannot be pruned; the first reason stays."""
    for atom in atoms_in(factors):
        atom.frozen = atom.frozen or reason


def name_kind(factors: Factors, kind: str) -> None:
    """Give a kind to a dimension that is one axis, unless a kind of higher rank is known."""
    for atom in atoms_in(factors):
        if len(factors) == 1 and RANK[kind] > RANK[atom.kind]:
            atom.kind = kind


def join(a: Factors, b: Factors, reason: str) -> Factors:
    """Join two dimensions that are the same one; where their factors do not match, both are frozen for the reason."""
    if not atoms_in(a) or not atoms_in(b):
        freeze(a, reason)
        freeze(b, reason)
        return a if atoms_in(a) else b
    same = len(a) == len(b) and all(
        isinstance(x, Atom) == isinstance(y, Atom)
        and (not isinstance(x, Atom) or not isinstance(y, Atom) or _fit(x, y))
        for x, y in zip(a, b, strict=True)
    )
    if not same:
        freeze(a, reason)
        freeze(b, reason)
        return a
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Atom) and isinstance(y, Atom):
            _union(x.root(), y.root())
    return a


def _fit(x: Atom, y: Atom) -> bool:
    return x.root().size == y.root().size


def _union(x: Atom, y: Atom) -> None:
    if x is y:
        return
    first, second = (x, y) if RANK[x.kind] >= RANK[y.kind] else (y, x)
    second.joined = first
    first.frozen = first.frozen or second.frozen
    first.depth = min(first.depth, second.depth)
