"""Expressions over named axes: the grammar behind `(L0.kv L0.group L0.qk) hidden`.

A dimension of a tensor is a sum of terms, a term is a product of factors (outermost first), and a factor is an
axis name, a plain integer or a dimension in parentheses. `(L0.head L0.qk + L0.head L0.v)` is a fused projection:
the rows of one part, then the rows of the other.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from secateur.errors import LayoutError, shown

Factor: TypeAlias = "str | int | Dim"
Term: TypeAlias = "tuple[Factor, ...]"
Dim: TypeAlias = "tuple[Term, ...]"

_TOKEN = re.compile(r"\s*([()+]|[^\s()+]+)")
_MOST_DEPTH = 16
"""Deepest nesting of parentheses: a fused projection of grouped heads takes three."""


def parse_dims(text: str) -> tuple[Dim, ...]:
    """Read the dimensions of one tensor, outermost first; the empty text is a scalar.

    Raises LayoutError when parentheses do not match or a term is empty.
    """
    tokens = _TOKEN.findall(text)
    position = depth = 0

    def term(stops: tuple[str, ...]) -> Term:
        nonlocal position
        factors: list[Factor] = []
        while position < len(tokens) and tokens[position] not in stops:
            factors.append(factor())
        if not factors:
            raise LayoutError(f"empty term in the axis string {shown(text)}; write at least one axis or a number")
        return tuple(factors)

    def factor() -> Factor:
        nonlocal position, depth
        token = tokens[position]
        position += 1
        if token == "(":
            depth += 1
            if depth > _MOST_DEPTH:
                raise LayoutError(f"more than {_MOST_DEPTH} nested parentheses in the axis string {shown(text)}")
            terms = [term(("+", ")"))]
            while position < len(tokens) and tokens[position] == "+":
                position += 1
                terms.append(term(("+", ")")))
            if position >= len(tokens):
                raise LayoutError(f"missing ')' in the axis string {shown(text)}")
            position += 1
            depth -= 1
            return tuple(terms)
        if token in ")+":
            raise LayoutError(f"stray {token!r} in the axis string {shown(text)}; sums stand in parentheses")
        return int(token) if token.isdigit() else token

    dims = []
    while position < len(tokens):
        outermost = factor()
        dims.append(outermost if isinstance(outermost, tuple) else ((outermost,),))
    return tuple(dims)


def is_axis_name(name: str) -> bool:
    """Whether a text can stand as an axis in an axis string: no spaces, parentheses or +, at most 200 characters."""
    return len(name) <= 200 and re.fullmatch(r"[^\s()+]+", name) is not None


def format_dims(dims: tuple[Dim, ...]) -> str:
    """Write dimensions as the axis string that `parse_dims` reads."""
    return " ".join(_format_dim(dim, bare=True) for dim in dims)


def _format_dim(dim: Dim, *, bare: bool = False) -> str:
    """One dimension as text; `bare`: a single axis or number stands without parentheses."""
    terms = [" ".join(_format_dim(f) if isinstance(f, tuple) else str(f) for f in term) for term in dim]
    if bare and len(dim) == 1 and len(dim[0]) == 1 and not isinstance(dim[0][0], tuple):
        return terms[0]
    return f"({' + '.join(terms)})"


def names(dim: Dim) -> Iterator[str]:
    """Every axis name in a dimension, in order, repeats included."""
    for term in dim:
        for factor in term:
            if isinstance(factor, str):
                yield factor
            elif isinstance(factor, tuple):
                yield from names(factor)


def extent(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The number of positions along a dimension. sizes: axis -> its size."""
    return sum(math.prod(_factor_extent(f, sizes) for f in term) for term in dim)


def _factor_extent(factor: Factor, sizes: Mapping[str, int]) -> int:
    """The number of positions of one factor; LayoutError for an axis without a size."""
    if isinstance(factor, tuple):
        return extent(factor, sizes)
    if isinstance(factor, int):
        return factor
    if factor not in sizes:
        raise LayoutError(f"the axis {factor!r} is used by a parameter but not declared")
    return sizes[factor]


def coordinates(dim: Dim, axis: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Which unit of `axis` owns each position along `dim`: int64 of shape (extent,), -1 where none does."""
    parts = []
    for term in dim:
        owner = np.full(1, -1, dtype=np.int64)
        for factor in term:
            if factor == axis:
                inner = np.arange(sizes[axis], dtype=np.int64)
            elif isinstance(factor, tuple):
                inner = coordinates(factor, axis, sizes)
            else:
                inner = np.full(_factor_extent(factor, sizes), -1, dtype=np.int64)
            owner = np.where(inner[None, :] >= 0, inner[None, :], owner[:, None]).reshape(-1)
        parts.append(owner)
    return np.concatenate(parts)
