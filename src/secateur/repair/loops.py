"""The inner loops of the methods, in pure form: functions of arrays of any library, without item assignment.

`secateur.torch.repair_loops` has the fast forms for tensors, under the same names. Nothing here imports a method.
"""

import itertools
import math
from typing import Any

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, namespace, to_numpy
from secateur.select import NM, Block, Element, nm_mask, top

STEPS = 200
"""Most steps of conjugate gradients."""

MOST_PATTERNS = 128
"""Groups with more N:M patterns than this swap weight by weight instead."""


# -- choice by rank ---------------------------------------------------------------------------------------------------


def choose(scores: Array, pattern: Element | NM | Block, zeros: int | None, *, by_row: bool = False) -> Array:
    """Bool mask of shape (out, in), True for what stays: the best of each N:M group, or all but the `zeros` lowest.

    For blocks, `zeros` counts blocks and the score of a block is the sum over its weights. `by_row` divides the zeros
    evenly among the rows (of weights or blocks); the first rows get one more where they do not divide. Ties go to the
    lower index.
    """
    if isinstance(pattern, NM):
        return nm_mask(scores, pattern)
    xp = namespace(scores)
    rows, columns = (pattern.rows, pattern.columns) if isinstance(pattern, Block) else (1, 1)
    out, inputs = scores.shape
    if (rows, columns) != (1, 1):
        scores = xp.sum(xp.reshape(scores, (out // rows, rows, inputs // columns, columns)), axis=(1, 3))
    grid = to_numpy(scores)
    if by_row:
        zeros_per_row, remainder = divmod(zeros or 0, len(grid))
        first = _best_of_rows(grid[:remainder], zeros_per_row + 1)
        alive = np.concatenate([first, _best_of_rows(grid[remainder:], zeros_per_row)])
    else:
        alive = top(grid.reshape(-1), grid.size - (zeros or 0)).reshape(grid.shape)
    if (rows, columns) != (1, 1):
        alive = np.repeat(np.repeat(alive, rows, axis=0), columns, axis=1)
    return xp.asarray(alive, device=device(scores))


def _best_of_rows(scores: np.ndarray, zeros: int) -> np.ndarray:
    """All but the `zeros` lowest of each row, ties to the lower index."""
    if not zeros or not len(scores):
        return np.ones(scores.shape, dtype=bool)
    if zeros >= scores.shape[1]:
        return np.zeros(scores.shape, dtype=bool)
    last = np.partition(scores, zeros, axis=1)[:, zeros, None]
    alive = scores >= last
    for row in np.flatnonzero(alive.sum(1) != scores.shape[1] - zeros):  # ties
        alive[row] = top(scores[row], scores.shape[1] - zeros)
    return alive


# -- factors of a gram ------------------------------------------------------------------------------------------------


def with_diagonal(gram: Array, diagonal: Array, dead: Array) -> Array:
    """The gram made symmetric in the type of the diagonal, with that diagonal; zero beside it for dead inputs."""
    xp = namespace(gram)
    symmetric = xp.astype(gram, diagonal.dtype, copy=False)
    symmetric = (symmetric + xp.matrix_transpose(symmetric)) / 2
    if bool(xp.any(dead)):
        alive = xp.astype(~dead, diagonal.dtype)
        symmetric = symmetric * alive[:, None] * alive[None, :]
    index = xp.arange(len(diagonal), device=device(gram))
    return xp.where(index[:, None] == index[None, :], diagonal[None, :], symmetric)


def reversed_factor(gram: Array, diagonal: Array, dead: Array) -> Array:
    """Cholesky factor of `with_diagonal` with both of its axes reversed."""
    xp = namespace(gram)
    return xp.linalg.cholesky(xp.flip(with_diagonal(gram, diagonal, dead), axis=(0, 1)))


def triangular_inverse(upper: Array, base: int = 64) -> Array:
    """Inverse of an upper triangular matrix by halves: [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1]."""
    xp = namespace(upper)
    size = upper.shape[0]
    if size <= base:
        return xp.linalg.inv(upper)
    half = size // 2
    a, c = triangular_inverse(upper[:half, :half], base), triangular_inverse(upper[half:, half:], base)
    corner = -(a @ upper[:half, half:] @ c)
    below = xp.zeros((size - half, half), dtype=upper.dtype, device=device(upper))
    return xp.concat([xp.concat([a, corner], axis=1), xp.concat([below, c], axis=1)], axis=0)


def solve_positive(corr: Array, rho: float, right: Array) -> Array:
    """The rows x of right (out, in) with (corr + rho I) x = right."""
    xp = namespace(corr)
    index = xp.arange(corr.shape[0], device=device(corr))
    shifted = xp.where(index[:, None] == index[None, :], corr + rho, corr)
    return xp.matrix_transpose(xp.linalg.solve(shifted, xp.matrix_transpose(right)))


# -- SparseGPT --------------------------------------------------------------------------------------------------------


def shares(shape: tuple[int, ...], pattern: Any, sparsity: float, band: int) -> list[tuple[int, int, int]]:
    """Bands of columns (start, end, number of weights or blocks to prune in them)."""
    out, inputs = shape
    rows, columns = (pattern.rows, pattern.columns) if isinstance(pattern, Block) else (1, 1)
    bands, before = [], 0
    for start in range(0, inputs, band):
        end = min(start + band, inputs)
        after = round((out // rows) * (end // columns) * sparsity)
        bands.append((start, end, after - before))
        before = after
    return bands


def sweep(weight: Array, upper: Array, dead: Array, pattern: Any, sparsity: float, band: int) -> tuple[Array, Array]:
    """The weight after all columns, and the mask of what stays: see `secateur.repair.sparsegpt` for the formula.

    weight (out, in); upper (in, in): the upper Cholesky factor of the inverse gram; dead (in,): inputs that are always
    zero; band: how many columns choose together what goes.
    """
    xp = namespace(weight)
    inverse = xp.where(dead, xp.zeros_like(xp.linalg.diagonal(upper)), 1 / xp.linalg.diagonal(upper))
    rest, done, masks = weight, [], []
    for start, end, zeros in shares(weight.shape, pattern, sparsity, band):
        width = end - start
        here, rest = rest[:, :width], rest[:, width:]
        factor = inverse[start:end]
        stays: list[Array] = []  # by column
        if not isinstance(pattern, NM):
            mask = choose((here * factor[None, :]) ** 2, pattern, zeros)
            stays = [mask[:, j] for j in range(width)]
        kept, errors = [], []
        for j in range(width):
            if isinstance(pattern, NM) and j % pattern.of == 0:
                group = choose((here[:, : pattern.of] * factor[None, j : j + pattern.of]) ** 2, pattern, None)
                stays += [group[:, i] for i in range(pattern.of)]
            column = here[:, 0]
            kept.append(xp.where(stays[j], column, xp.zeros_like(column)))
            errors.append((column - kept[j]) * factor[j])
            here = here[:, 1:] - errors[j][:, None] * upper[start + j, start + j + 1 : end][None, :]
        done.append(xp.stack(kept, axis=1))
        masks.append(xp.stack(stays, axis=1))
        rest = rest - xp.stack(errors, axis=1) @ upper[start:end, end:]
    return xp.concat(done, axis=1), xp.concat(masks, axis=1)


# -- least squares ----------------------------------------------------------------------------------------------------


def default_tolerance(array: Array) -> float:
    """Relative residual at which conjugate gradients stop, by the type of the array.

    The loss above its minimum is of second order in it: about 1e-6 in float32.
    """
    xp = namespace(array)
    return 1e-10 if array.dtype == xp.float64 else 1e-3


def refit(
    values: Array, dense: Array, corr: Array, mask: Array, tolerance: float | None = None, steps: int = STEPS
) -> Array:
    """The minimiser of each row over its support, by conjugate gradients on all rows at once.

    values: where to start (out, in); dense: the weight to match (out, in); corr (in, in) with a unit diagonal.
    """
    xp = namespace(values)
    keep = xp.astype(mask, values.dtype)
    tolerance = default_tolerance(values) if tolerance is None else tolerance
    values = values * keep
    goal = tolerance**2 * xp.sum((keep * (dense @ corr)) ** 2, axis=1)
    residual = keep * ((dense - values) @ corr)
    size = xp.sum(residual**2, axis=1)
    direction = residual
    for _ in range(steps):
        busy = size > goal
        if not bool(xp.any(busy)):
            break
        image = keep * (direction @ corr)
        step = _ratio(size, xp.sum(direction * image, axis=1), busy)
        values = values + step[:, None] * direction
        residual = residual - step[:, None] * image
        after = xp.sum(residual**2, axis=1)
        direction = residual + _ratio(after, size, busy)[:, None] * direction
        size = after
    return values


def _ratio(above: Array, below: Array, busy: Array) -> Any:
    """above / below in rows that are still busy, else 0."""
    xp = namespace(above)
    good = busy & (below > 0)
    return xp.where(good, above, xp.zeros_like(above)) / xp.where(good, below, xp.ones_like(below))


# -- swaps ------------------------------------------------------------------------------------------------------------


def slack_of(array: Array) -> float:
    """By how much a swap has to win, relative to what it costs, so that rounding cannot make swaps go in circles."""
    return 1 + (1e-9 if array.dtype == namespace(array).float64 else 1e-4)


def patterns_of(pattern: Any) -> np.ndarray | None:
    """All ways to keep `keep` of `of`, uint8 of shape (count, keep); None where there are too many."""
    if not isinstance(pattern, NM) or pattern.of > 16 or math.comb(pattern.of, pattern.keep) > MOST_PATTERNS:
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
    """One pass over all columns, all rows at once: new values (out, in), new mask, number of swaps.

    See `secateur.repair.swaps` for the formula. values, dense, mask: (out, in); corr: (in, in); dead: (in,).
    """
    patterns = patterns_of(pattern)
    if patterns is not None:
        return _group_pass(values, dense, corr, mask, pattern, patterns)
    return _block_pass(values, dense, corr, mask, dead, pattern)


def _group_pass(
    values: Array, dense: Array, corr: Array, mask: Array, pattern: NM, patterns: np.ndarray
) -> tuple[Array, Array, int]:
    """Each N:M group takes the best of all its patterns."""
    xp = namespace(values)
    inverses, slack, changed = inverses_of(corr, patterns, pattern.of), slack_of(values), 0
    residual = (dense - values) @ corr
    one_hot = np.zeros((*patterns.shape, pattern.of))
    np.put_along_axis(one_hot, patterns[..., None].astype(np.int64), 1.0, axis=2)
    slots = xp.asarray(one_hot, dtype=values.dtype, device=device(values))  # (count, keep, of)
    members = xp.sum(slots, axis=1)  # (count, of)
    new_values, new_masks = [], []
    for group, start in enumerate(range(0, values.shape[1], pattern.of)):
        band = slice(start, start + pattern.of)
        here, kept = values[:, band], xp.astype(mask[:, band], values.dtype)
        pull = residual[:, band] + here @ corr[band, band]
        pulls = xp.sum(slots[None, ...] * pull[:, None, None, :], axis=-1)  # (out, count, keep)
        best = xp.sum(inverses[group][None, ...] * pulls[:, :, None, :], axis=-1)
        gains = xp.sum(best * pulls, axis=-1)  # (out, count)
        current = xp.all(members[None, ...] == kept[:, None, :], axis=-1)
        now = xp.sum(xp.where(current, gains, xp.zeros_like(gains)), axis=1)
        highest = xp.argmax(gains, axis=1)
        moves = (xp.max(gains, axis=1) > now * slack) | ~xp.any(current, axis=1)
        chosen = xp.where(moves, highest, xp.argmax(xp.astype(current, xp.int32), axis=1))
        choice = xp.astype(chosen[:, None] == xp.arange(gains.shape[1], device=device(values))[None, :], values.dtype)
        changed += int(xp.sum(xp.astype(~xp.any(current & (choice > 0), axis=1), xp.int64)))
        after = xp.sum(choice[:, :, None] * xp.sum(best[..., None] * slots[None, ...], axis=2), axis=1)
        residual = residual - (after - here) @ corr[band, :]
        new_values.append(after)
        new_masks.append(choice @ members > 0)
    return xp.concat(new_values, axis=1), xp.concat(new_masks, axis=1), changed


def _block_pass(
    values: Array, dense: Array, corr: Array, mask: Array, dead: Array, pattern: Any
) -> tuple[Array, Array, int]:
    """Swaps of blocks (rows x columns; a single weight is a block of 1 x 1), within a stripe of rows or, for N:M,
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
    residual = (dense - values) @ corr
    corr_rows = xp.reshape(corr, (count, columns, corr.shape[0]))
    for q in range(count):
        band = slice(q * columns, (q + 1) * columns)
        here = values[:, band]
        without = residual + here @ corr[band, :]
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
        choice = (chosen[:, None] == index[None, :]) & active[:, None]
        taken_in = xp.where(choice[:, None, :, None], best, xp.zeros_like(best))
        dropped = (active[:, None] & (index == q)[None, :])[:, None, :, None]
        grid = xp.reshape(values, taken_in.shape)
        values = xp.reshape(xp.where(dropped, xp.zeros_like(grid), grid) + taken_in, values.shape)
        chosen_rows = xp.take(corr_rows, chosen, axis=0)  # (stripes, columns, in)
        after = xp.reshape(without, (stripes, rows, -1)) - xp.sum(taken_in, axis=2) @ chosen_rows
        residual = xp.where(xp.repeat(active, rows)[:, None], xp.reshape(after, residual.shape), residual)
        kept = (kept & ~((index == q)[None, :] & active[:, None])) | choice
        changed += int(xp.sum(xp.astype(moves, xp.int64)))
    alive = xp.broadcast_to(kept[:, None, :, None], (stripes, rows, count, columns))
    return values, xp.reshape(alive, mask.shape), changed
