"""Fast forms for torch tensors of the loops in `secateur.repair.loops`, under the same names, with equal results.

On the CPU they run in the compiled kernels; without these, or on another device, in torch operations over all rows.
"""

import functools
import warnings
from types import ModuleType
from typing import Any

import torch

from secateur.kernels.native import load_native
from secateur.repair import loops
from secateur.repair.loops import STEPS, choose, default_tolerance, inverses_of, patterns_of, shares, slack_of
from secateur.select import NM, Element


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels where they contain the loops of repair, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning is about sparse layers, which are not used here
        native = load_native()
    return native if native is not None and hasattr(native, "repair_sweep") else None


def reversed_factor(gram: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Fast form of `secateur.repair.loops.reversed_factor`; holds two matrices at most beside the gram."""
    reverse = gram.flip(0, 1).to(diagonal.dtype)
    if dead.any():
        gone = dead.flip(0)
        reverse[gone] = 0
        reverse[:, gone] = 0
    reverse.diagonal().copy_(diagonal.flip(0))
    return torch.linalg.cholesky(reverse)


def triangular_inverse(upper: torch.Tensor, base: int = 64) -> torch.Tensor:
    """Fast form of `secateur.repair.loops.triangular_inverse`, which writes into one new matrix."""
    inverse = torch.zeros_like(upper)
    open_parts = [(0, len(upper))]
    parts = []
    while open_parts:  # each part before its halves: the loop below takes them from the end
        start, end = open_parts.pop()
        parts.append((start, end))
        if end - start > base:
            middle = (start + end) // 2
            open_parts += [(start, middle), (middle, end)]
    for start, end in reversed(parts):
        if end - start <= base:
            inverse[start:end, start:end] = torch.linalg.inv(upper[start:end, start:end])
        else:
            middle = (start + end) // 2
            corner = inverse[start:middle, start:middle] @ upper[start:middle, middle:end]
            inverse[start:middle, middle:end] = (corner @ inverse[middle:end, middle:end]).neg_()
    return inverse


def sweep(
    weight: torch.Tensor, upper: torch.Tensor, dead: torch.Tensor, pattern: Any, sparsity: float, band: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fast form of `secateur.repair.loops.sweep`."""
    upper = upper.contiguous()
    diagonal = upper.diagonal()
    inverse = torch.where(dead, torch.zeros_like(diagonal), 1 / diagonal)
    rest = weight.clone(memory_format=torch.contiguous_format)
    masks = torch.zeros_like(weight, dtype=torch.bool)
    for start, end, zeros in shares(tuple(weight.shape), pattern, sparsity, band):
        here = rest[:, start:end]
        if not isinstance(pattern, NM):
            masks[:, start:end] = choose((here * inverse[start:end]).square(), pattern, zeros)
        sweep_band = _native_band if _fits(weight) else _sweep_band
        errors = sweep_band(here, masks[:, start:end], upper[start:end, start:end], inverse[start:end], pattern)
        if end < weight.shape[1]:
            rest[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return rest, masks


def _sweep_band(
    here: torch.Tensor, mask: torch.Tensor, upper: torch.Tensor, inverse: torch.Tensor, pattern: Any
) -> torch.Tensor:
    """Sweep over the columns of a band in place; returns the errors that the columns behind it take, (out, columns).

    here (out, columns): the weights. mask (out, columns): what stays, which is chosen here for N:M.
    upper (columns, columns), inverse (columns,): as in `sweep`.
    """
    columns, keep = here.T.contiguous(), mask.T.contiguous()
    errors = torch.zeros_like(columns)
    for j in range(len(columns)):
        if isinstance(pattern, NM) and j % pattern.of == 0:
            group = slice(j, j + pattern.of)
            keep[group] = choose((columns[group] * inverse[group, None]).square().T, pattern, None).T
        errors[j] = torch.where(keep[j], 0, columns[j] * inverse[j])
        columns[j].masked_fill_(~keep[j], 0)
        if j + 1 < len(columns):
            columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    here.copy_(columns.T)
    mask.copy_(keep.T)
    return errors.T


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether there are compiled loops, and they take the tensors: in main memory, all float32 or all float64."""
    dtypes = {t.dtype for t in tensors}
    fits = all(t.device.type == "cpu" for t in tensors) and dtypes in ({torch.float32}, {torch.float64})
    return fits and kernels() is not None


def _native() -> ModuleType:
    """The compiled kernels, where `_fits` says that there are some."""
    native = kernels()
    if native is None:
        raise RuntimeError("the compiled loops of repair are not there")
    return native


def _native_band(
    here: torch.Tensor, mask: torch.Tensor, upper: torch.Tensor, inverse: torch.Tensor, pattern: Any
) -> torch.Tensor:
    """`_sweep_band` in the compiled loop."""
    keep = mask.to(torch.uint8, copy=True).contiguous()
    errors = torch.empty(here.shape, dtype=here.dtype)
    inverse = inverse.contiguous()
    nm_keep, nm_of = (pattern.keep, pattern.of) if isinstance(pattern, NM) else (0, 0)
    _native().repair_sweep(
        here.data_ptr(),
        here.stride(0),
        *here.shape,
        upper.data_ptr(),
        upper.stride(0),
        inverse.data_ptr(),
        keep.data_ptr(),
        nm_keep,
        nm_of,
        errors.data_ptr(),
        here.dtype == torch.float64,
        torch.get_num_threads(),
        0,
    )
    mask.copy_(keep)
    return errors


def swap_pass(
    values: torch.Tensor, dense: torch.Tensor, corr: torch.Tensor, mask: torch.Tensor, dead: torch.Tensor, pattern: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Fast form of `secateur.repair.loops.swap_pass`; the pure one where the compiled loops lack the pattern."""
    patterns = patterns_of(pattern)
    if not _fits(values, dense, corr) or not (isinstance(pattern, Element) or patterns is not None):
        return loops.swap_pass(values, dense, corr, mask, dead, pattern)
    corr, residual = corr.contiguous(), (dense - values) @ corr
    values = values.contiguous().clone()
    if patterns is not None:
        return _native_group_pass(values, residual, corr, mask, pattern, torch.from_numpy(patterns))
    return _native_element_pass(values, residual, corr, mask, dead)


def _native_group_pass(
    values: torch.Tensor,
    residual: torch.Tensor,
    corr: torch.Tensor,
    mask: torch.Tensor,
    pattern: NM,
    patterns: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Each N:M group takes the best of all its patterns (count, keep); in place in values and residual (out, in)."""
    rows, inputs = values.shape
    kept = mask.to(torch.uint8, copy=True).contiguous()
    inverses = inverses_of(corr, patterns.numpy(), pattern.of).contiguous()
    changed = _native().repair_group(
        corr.data_ptr(),
        rows,
        inputs,
        slack_of(values),
        values.data_ptr(),
        residual.data_ptr(),
        kept.data_ptr(),
        pattern.keep,
        pattern.of,
        patterns.data_ptr(),
        len(patterns),
        inverses.data_ptr(),
        values.dtype == torch.float64,
        torch.get_num_threads(),
        0,
    )
    return values, kept.bool(), changed


def _native_element_pass(
    values: torch.Tensor, residual: torch.Tensor, corr: torch.Tensor, mask: torch.Tensor, dead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Swaps of single weights within a row; in place in values and residual (out, in)."""
    rows, inputs = values.shape
    kept = (mask & ~dead).to(torch.uint8).contiguous()
    allowed = (~mask & ~dead).to(values.dtype).contiguous()
    largest = (corr - torch.eye(inputs, dtype=corr.dtype)).abs().amax(1).contiguous()
    changed = _native().repair_swap(
        corr.data_ptr(),
        largest.data_ptr(),
        rows,
        inputs,
        slack_of(values),
        values.data_ptr(),
        residual.data_ptr(),
        allowed.data_ptr(),
        kept.data_ptr(),
        values.dtype == torch.float64,
        torch.get_num_threads(),
        0,
    )
    return values, kept.bool() | (mask & dead), changed


def refit(
    values: torch.Tensor,
    dense: torch.Tensor,
    corr: torch.Tensor,
    mask: torch.Tensor,
    tolerance: float | None = None,
    steps: int = STEPS,
) -> torch.Tensor:
    """Fast form of `secateur.repair.loops.refit`; rows that are done leave the products."""
    keep = mask.to(values.dtype)
    tolerance = default_tolerance(values) if tolerance is None else tolerance
    values = values * keep
    goal = (keep * (dense @ corr)).square().sum(1) * tolerance**2
    residual = keep * ((dense - values) @ corr)
    size = residual.square().sum(1)
    busy = size > goal
    direction, rows = residual, torch.arange(len(values), device=values.device)
    for _ in range(steps):
        if not busy.any():
            break
        if busy.sum() < 0.8 * len(busy):
            rows, keep, goal, residual, direction, size = (
                t[busy] for t in (rows, keep, goal, residual, direction, size)
            )
            busy = size > goal
        image = keep * (direction @ corr)
        below = (direction * image).sum(1)
        good = busy & (below > 0)
        step = torch.where(good, size / below.where(good, 1), 0)[:, None]
        values.index_add_(0, rows, step * direction)
        residual = residual - step * image
        after = residual.square().sum(1)
        direction = residual + torch.where(good, after / size.where(good, 1), 0)[:, None] * direction
        size = after
        busy = size > goal
    return values


def solve_positive(corr: torch.Tensor, rho: float, right: torch.Tensor) -> torch.Tensor:
    """Fast form of `secateur.repair.loops.solve_positive`."""
    shifted = corr.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(shifted)).T
