"""SparseGPT: optimal brain surgery, one column at a time (Frantar and Alistarh, 2023).

With U the upper Cholesky factor of the inverse gram, the score of a weight is w^2 / U_jj^2. Columns are taken from
left to right: a pruned weight w_j leaves the error e = w_j / U_jj, and the columns behind it take -e U_j,: .
"""

from typing import Any

from secateur.arrays import Array, namespace
from secateur.repair.forms import fast_form
from secateur.repair.gram import Gram
from secateur.repair.problem import choose, pose
from secateur.select import NM, Block, Element


def sparsegpt(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    damp: float | None = None,
    columns: int = 128,
    fast: bool = True,
) -> Array:
    """Prune and mend a weight (out, in); see `secateur.repair` for arguments and errors.

    damp: added to the diagonal of the gram, relative to its mean. columns: how many columns choose together what goes,
    rounded to whole groups or blocks. fast=False takes the pure form, as slow as it is plain.
    Counts over the matrix: element and block patterns give each band of `columns` its share, over all rows, and the
    shares add up to round(sparsity * number of weights or blocks) zeros.
    """
    problem = pose(weight, gram, pattern, sparsity, damp)
    loop = (fast_form("sweep", weight) if fast else None) or sweep
    xp = problem.xp
    upper = xp.astype(problem.gram.upper, problem.weight.dtype)
    step = pattern.of if isinstance(pattern, NM) else problem.grid[1]
    band = max(step, columns // step * step)
    new, mask = loop(problem.weight, upper, problem.gram.dead, pattern, problem.sparsity, band)
    return problem.finish(new, mask)


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
    """The weight after all columns, and the mask of what stays; the pure form, without item assignment.

    weight (out, in), upper (in, in), dead (in,).
    """
    xp = namespace(weight)
    inverse = xp.where(dead, xp.zeros_like(xp.linalg.diagonal(upper)), 1 / xp.linalg.diagonal(upper))
    rest, done, masks = weight, [], []
    for start, end, zeros in shares(weight.shape, pattern, sparsity, band):
        width = end - start
        here, rest = rest[:, :width], rest[:, width:]
        factor = inverse[start:end]
        mask = None if isinstance(pattern, NM) else choose((here * factor[None, :]) ** 2, pattern, zeros)
        kept, chosen, errors = [], [], []
        group: Array = None
        for j in range(width):
            if isinstance(pattern, NM):
                if j % pattern.of == 0:
                    group = choose((here[:, : pattern.of] * factor[None, j : j + pattern.of]) ** 2, pattern, None)
                stays = group[:, j % pattern.of]
            else:
                assert mask is not None
                stays = mask[:, j]
            column = here[:, 0]
            stays_put = xp.where(stays, column, xp.zeros_like(column))
            error = (column - stays_put) * factor[j]
            here = here[:, 1:] - error[:, None] * upper[start + j, start + j + 1 : end][None, :]
            kept.append(stays_put)
            chosen.append(stays)
            errors.append(error)
        done.append(xp.stack(kept, axis=1))
        masks.append(xp.stack(chosen, axis=1))
        rest = rest - xp.stack(errors, axis=1) @ upper[start:end, end:]
    return xp.concat(done, axis=1), xp.concat(masks, axis=1)
