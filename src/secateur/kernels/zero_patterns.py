"""Finds the pattern that the zeros of a weight follow, so that the formats made for it can be tried."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.kernels.format import BLOCKS, GROUPS, MAX_QUAD_COLUMNS, QUAD
from secateur.kernels.packing import fits_groups

FILL = 0.75
"""A weight has blocks when at least this share of the weights in its nonzero blocks is nonzero."""


@dataclass(frozen=True)
class Zeros:
    """The pattern of a weight's zeros.

    - `block`: so many rows (8, 4, or 0 for none) of a column are kept or removed together
    - `quads`: four columns of a row (a 1x4 block) are kept or removed together
    - `groups`: (keep, of): at most `keep` of `of` consecutive columns are nonzero; None for no such pattern
    """

    block: int = 0
    quads: bool = False
    groups: tuple[int, int] | None = None

    def __str__(self) -> str:
        nm = "" if self.groups is None else f" {self.groups[0]}:{self.groups[1]}"
        return f"{self.block}x1" + " 1x4" * self.quads + nm


def zeros_of(weight: np.ndarray) -> Zeros:
    """The pattern of the zeros of a weight (rows, cols)."""
    nonzero = weight != 0
    return Zeros(block_of(nonzero), has_quads(nonzero), groups_of(nonzero))


def block_of(nonzero: np.ndarray) -> int:
    """The largest block of rows (8 or 4) that a mask (rows, cols) consists of; 0 for none."""
    return next((block for block in sorted(BLOCKS, reverse=True) if _filled(nonzero, block, 0)), 0)


def has_quads(nonzero: np.ndarray) -> bool:
    """Whether a mask (rows, cols) consists of blocks of four columns of a row."""
    return nonzero.shape[1] <= MAX_QUAD_COLUMNS and _filled(nonzero, QUAD, 1)


def groups_of(nonzero: np.ndarray) -> tuple[int, int] | None:
    """The N:M pattern that a mask (rows, cols) fits, if it can be stored without many zeros; None for none."""
    kept = np.count_nonzero(nonzero)
    return next(
        (
            (keep, of)
            for keep, of in GROUPS
            if kept >= FILL * nonzero.size * keep / of and fits_groups(nonzero, keep, of)
        ),
        None,
    )


def _filled(nonzero: np.ndarray, block: int, axis: int) -> bool:
    kept = np.count_nonzero(nonzero)
    touched = np.count_nonzero(np.add.reduceat(nonzero, np.arange(0, nonzero.shape[axis], block), axis=axis))
    return bool(kept and kept >= FILL * block * touched)
