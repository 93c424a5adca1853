"""Exact 1-swaps: what is kept gives its place to what would serve better, until no such swap is left.

In the scale where the gram has a unit diagonal, C: with v the weights of a row and r = (v0 - v) C, dropping q and
taking p in at its best value lowers the loss by (r_p + v_q C_qp)^2 and raises it by (v_q + r_q)^2 over that of v_q at
its own best value. For an N:M pattern each group takes the best of all its patterns, at their jointly best values
(block coordinate descent). Every step lowers the loss, so the result is never worse than the start.
"""

import itertools
import math
from typing import Any

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, namespace
from secateur.repair.forms import fast_form
from secateur.repair.gram import Gram
from secateur.repair.least_squares import default_tolerance, refit
from secateur.repair.problem import pose
from secateur.repair.start import Start, start_mask
from secateur.select import NM, Block, Element

PATTERNS = 128
"""Groups with more patterns than this swap weight by weight instead."""


def swaps(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    start: Start = None,
    damp: float | None = None,
    passes: int = 2,
    tolerance: float | None = None,
    fast: bool = True,
) -> Array:
    """Refine what is kept of a weight (out, in), and its values; see `secateur.repair` for arguments and errors.

    start: a bool mask, a pruned weight, or a method that gives one; SparseGPT when left out. The number of zeros of
    each row (of blocks), and of each N:M group, stays as it is.
    passes: each pass looks at every kept weight once, after a least squares fit; fewer where a pass changes nothing.
    Large enough, no single swap lowers the loss any more; two get within a percent of that.
    tolerance: of the least squares fits (default: that of `least_squares`, and tenfold between passes).
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    xp = problem.xp
    mask, values = start_mask(problem, start, fast)
    scale = xp.astype(problem.gram.scale, problem.weight.dtype)[None, :]
    corr = xp.astype(problem.gram.correlation, problem.weight.dtype)
    dead = problem.gram.dead
    fit = (fast_form("refit", values) if fast else None) or refit
    turn = (fast_form("swap_pass", values) if fast else None) or swap_pass
    dense, values = problem.weight * scale, xp.where(dead[None, :], xp.zeros_like(values), values * scale)
    live = ~dead[None, :]
    between = 10 * default_tolerance(values) if tolerance is None else tolerance
    for _ in range(passes):
        values = fit(values, dense, corr, mask & live, between)
        values, mask, changed = turn(values, dense, corr, mask, dead, pattern)
        if not changed:
            break
    values = fit(values, dense, corr, mask & live, tolerance)
    return problem.finish(values / scale, mask)


def slack_of(array: Array) -> float:
    """By how much a swap has to win, relative to what it costs, so that rounding cannot make swaps go in circles."""
    return 1 + (1e-9 if array.dtype == namespace(array).float64 else 1e-4)


def patterns_of(pattern: Any) -> np.ndarray | None:
    """All ways to keep `keep` of `of`, uint8 of shape (count, keep); None where there are too many."""
    if not isinstance(pattern, NM) or pattern.of > 16 or math.comb(pattern.of, pattern.keep) > PATTERNS:
        return None
    return np.array(list(itertools.combinations(range(pattern.of), pattern.keep)), dtype=np.uint8)


def inverses_of(corr: Array, patterns: np.ndarray, of: int) -> Array:
    """The inverse of the part of C that each pattern of each group keeps: (in / of, count, keep, keep)."""
    xp = namespace(corr)
    groups = xp.stack([corr[i : i + of, i : i + of] for i in range(0, corr.shape[0], of)])
    parts = []
    for kept in patterns.tolist():
        rows = xp.stack([xp.stack([groups[:, i, j] for j in kept], axis=-1) for i in kept], axis=-2)
        parts.append(xp.linalg.inv(rows))
    return xp.stack(parts, axis=1)


def swap_pass(
    values: Array, dense: Array, corr: Array, mask: Array, dead: Array, pattern: Any
) -> tuple[Array, Array, int]:
    """One pass over all columns, all rows at once: new values (out, in), new mask, number of swaps; the pure form."""
    patterns = patterns_of(pattern)
    if patterns is not None:
        return _group_pass(values, dense, corr, mask, pattern, patterns)
    return _block_pass(values, dense, corr, mask, dead, pattern)


def _group_pass(
    values: Array, dense: Array, corr: Array, mask: Array, pattern: NM, patterns: np.ndarray
) -> tuple[Array, Array, int]:
    xp = namespace(values)
    inverses, slack, changed = inverses_of(corr, patterns, pattern.of), slack_of(values), 0
    left = (dense - values) @ corr
    place = np.zeros((*patterns.shape, pattern.of))
    np.put_along_axis(place, patterns[..., None].astype(np.int64), 1.0, axis=2)
    place = xp.asarray(place, dtype=values.dtype, device=device(values))  # (count, keep, of), one-hot
    held = xp.sum(place, axis=1)  # (count, of)
    new_values, new_masks = [], []
    for group, o in enumerate(range(0, values.shape[1], pattern.of)):
        here, kept = values[:, o : o + pattern.of], xp.astype(mask[:, o : o + pattern.of], values.dtype)
        pull = left[:, o : o + pattern.of] + here @ corr[o : o + pattern.of, o : o + pattern.of]
        pulls = xp.sum(place[None, ...] * pull[:, None, None, :], axis=-1)  # (out, count, keep)
        best = xp.sum(inverses[group][None, ...] * pulls[:, :, None, :], axis=-1)
        gains = xp.sum(best * pulls, axis=-1)  # (out, count)
        current = xp.all(held[None, ...] == kept[:, None, :], axis=-1)
        now = xp.sum(xp.where(current, gains, xp.zeros_like(gains)), axis=1)
        top = xp.argmax(gains, axis=1)
        moves = (xp.max(gains, axis=1) > now * slack) | ~xp.any(current, axis=1)
        chosen = xp.where(moves, top, xp.argmax(xp.astype(current, xp.int32), axis=1))
        one = xp.astype(chosen[:, None] == xp.arange(gains.shape[1], device=device(values))[None, :], values.dtype)
        changed += int(xp.sum(xp.astype(~xp.any(current & (one > 0), axis=1), xp.int64)))
        after = xp.sum(one[:, :, None] * xp.sum(best[..., None] * place[None, ...], axis=2), axis=1)
        left = left - (after - here) @ corr[o : o + pattern.of, :]
        new_values.append(after)
        new_masks.append(one @ held > 0)
    return xp.concat(new_values, axis=1), xp.concat(new_masks, axis=1), changed


def _block_pass(
    values: Array, dense: Array, corr: Array, mask: Array, dead: Array, pattern: Any
) -> tuple[Array, Array, int]:
    """Swaps of blocks (rows x columns) of which a single weight is the smallest, within a stripe of rows or, for N:M,
    within a group.
    """
    xp = namespace(values)
    rows, columns = (pattern.rows, pattern.columns) if isinstance(pattern, Block) else (1, 1)
    stripes, count = values.shape[0] // rows, values.shape[1] // columns
    slack, changed = slack_of(values), 0
    index = xp.arange(count, device=device(values))
    inverses = xp.linalg.inv(
        xp.stack([corr[i : i + columns, i : i + columns] for i in range(0, corr.shape[0], columns)])
    )
    kept = xp.reshape(mask, (stripes, rows, count, columns))[:, 0, :, 0]
    gone = xp.all(xp.reshape(dead, (count, columns)), axis=1)
    left = (dense - values) @ corr
    corr_rows = xp.reshape(corr, (count, columns, corr.shape[0]))
    for q in range(count):
        band = slice(q * columns, (q + 1) * columns)
        here = values[:, band]
        without = left + here @ corr[band, :]
        pull = xp.reshape(without, (stripes, rows, count, columns))
        best = xp.sum(inverses[None, None, ...] * pull[..., None, :], axis=-1)
        gains = xp.sum(best * pull, axis=(1, 3))  # (stripes, count)
        allowed = ~kept & ~gone[None, :]
        if isinstance(pattern, NM):
            allowed = allowed & (index // pattern.of == q // pattern.of)[None, :]
        open_gains = xp.where(allowed, gains, xp.zeros_like(gains))
        active = kept[:, q] & ~gone[q]
        moves = active & (xp.max(open_gains, axis=1) > gains[:, q] * slack**2)
        chosen = xp.where(moves, xp.argmax(open_gains, axis=1), xp.full_like(xp.argmax(gains, axis=1), q))
        one = (chosen[:, None] == index[None, :]) & active[:, None]
        one_block = one[:, None, :, None]
        placed = xp.where(one_block, best, xp.zeros_like(best))
        dropped = (active[:, None] & (index == q)[None, :])[:, None, :, None]
        grid = xp.reshape(values, placed.shape)
        values = xp.reshape(xp.where(dropped, xp.zeros_like(grid), grid) + placed, values.shape)
        taken = xp.take(corr_rows, chosen, axis=0)  # (stripes, columns, in)
        after = xp.reshape(without, (stripes, rows, -1)) - xp.sum(placed, axis=2) @ taken
        left = xp.where(xp.repeat(active, rows)[:, None], xp.reshape(after, left.shape), left)
        kept = (kept & ~((index == q)[None, :] & active[:, None])) | one
        changed += int(xp.sum(xp.astype(moves, xp.int64)))
    alive = xp.broadcast_to(kept[:, None, :, None], (stripes, rows, count, columns))
    return values, xp.reshape(alive, mask.shape), changed
