"""Rows of the layer maps: what is kept of each block's units, and how dense its weights are."""

from collections.abc import Sequence
from typing import Any

from secateur.report import figures
from secateur.schemas.record import Matrix, Units

NAMES = {
    "head": "heads", "kv": "KV groups", "ffn": "FFN neurons", "hidden": "hidden width", "layer": "layers",
    "expert": "experts", "vocab": "vocabulary", "group": "heads a group", "qk": "width of Q and K", "v": "width of V",
}  # fmt: skip
"""Kind of axis -> what its units are called."""
MODEL = "model"
"""Row of what belongs to no block."""


def of_the_model(units: Sequence[Units]) -> str:
    """What is left of the axes that belong to no block, in a sentence; empty where there are none."""
    found = [f"{_name(unit)} {unit.kept:,} of {unit.total:,}" for unit in units if unit.block is None]
    return f"Of the whole model: {', '.join(found)}." if found else ""


def unit_rows(units: Sequence[Units]) -> list[dict[str, Any]]:
    """One row for each axis of a block, ordered by block."""
    units = [unit for unit in units if unit.block is not None]
    prefixes: dict[int, set[str]] = {}
    for unit in units:
        if unit.block is not None:
            prefixes.setdefault(unit.block, set()).add(unit.axis.rpartition(".")[0])
    is_plain = all(len(found) == 1 for found in prefixes.values())
    rows = []
    for unit in sorted(units, key=lambda unit: unit.block or 0):
        prefix = unit.axis.rpartition(".")[0]
        place = f"block {unit.block}" if is_plain or not prefix else prefix
        rows.append(
            {
                "row": place,
                "column": _name(unit),
                "share": unit.kept / unit.total if unit.total else 0.0,
                "label": f"{unit.kept}/{unit.total}",
                "share_text": figures.share(unit.kept / unit.total if unit.total else 0.0),
                "sizes": f"{unit.kept:,} of {unit.total:,}",
            }
        )
    return rows


def matrix_rows(matrices: Sequence[Matrix]) -> tuple[list[dict[str, Any]], str]:
    """One row for each weight, and what its share is: the density where a weight has zeros, else the share of the
    dense weight's entries that are left; none where nothing is known of those."""
    is_sparse = any(matrix.density < 0.9995 for matrix in matrices)
    known = [matrix for matrix in matrices if is_sparse or matrix.dense_shape]
    if not is_sparse and all(matrix.shape == matrix.dense_shape for matrix in known):
        return [], ""
    what = "density" if is_sparse else "share left"
    names = _short([_tail(matrix) for matrix in known])
    rows = []
    for matrix in sorted(known, key=lambda matrix: -1 if matrix.block is None else matrix.block):
        share = matrix.density if is_sparse else _entries(matrix.shape) / max(_entries(matrix.dense_shape or []), 1)
        before = f", dense {figures.shape(matrix.dense_shape)}" if matrix.dense_shape else ""
        rows.append(
            {
                "row": MODEL if matrix.block is None else f"block {matrix.block}",
                "column": names[_tail(matrix)],
                "share": min(share, 1.0),
                "label": figures.share(share),
                "share_text": figures.share(share),
                "sizes": f"{figures.shape(matrix.shape)}{before}; density {figures.share(matrix.density)}",
            }
        )
    return rows, what


def _name(unit: Units) -> str:
    """Heads, FFN neurons: what the units of an axis are called; an axis that is not called as its kind is itself."""
    last = unit.axis.rpartition(".")[2]
    return NAMES.get(unit.kind, unit.kind) if last == unit.kind or unit.axis == last else last


def _tail(matrix: Matrix) -> str:
    """The part of a weight's name behind its block: attention.self.query."""
    name = matrix.name.removesuffix(".weight")
    if matrix.block is None:
        return name
    parts = name.split(".")
    number = str(matrix.block)
    return ".".join(parts[parts.index(number) + 1 :]) if number in parts[:-1] else name


def _short(tails: Sequence[str]) -> dict[str, str]:
    """Each name by as few of its last words as tell it from the others."""
    names = list(dict.fromkeys(tails))
    short = {}
    for name in names:
        words = name.split(".")
        ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        others = [f".{other}" for other in names if other != name]
        short[name] = next((end for end in ends if not any(o.endswith(f".{end}") for o in others)), name)
    return short


def _entries(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
