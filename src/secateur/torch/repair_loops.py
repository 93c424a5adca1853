"""Fast forms of the inner loops of `secateur.repair` for torch tensors, equal to the pure ones.

On the CPU they run in the compiled kernels; without them, or on another device, in torch operations over all rows.
"""

import functools
import warnings
from types import ModuleType
from typing import Any

import torch

from secateur.kernels.native import load_native
from secateur.repair.least_squares import STEPS, default_tolerance
from secateur.repair.problem import choose
from secateur.repair.sparsegpt import shares
from secateur.repair.swaps import inverses_of, patterns_of, slack_of
from secateur.repair.swaps import swap_pass as pure_swap_pass
from secateur.select import NM, Element


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels when they have the loops of repair, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is slow here is not the sparse layers that the warning speaks of
        native = load_native()
    return native if native is not None and hasattr(native, "repair_sweep") else None


def reversed_factor(given: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """See `secateur.repair.gram._reversed_factor`; holds two matrices at most beside the gram."""
    reverse = given.flip(0, 1).to(diagonal.dtype)
    if dead.any():
        gone = dead.flip(0)
        reverse[gone] = 0
        reverse[:, gone] = 0
    reverse.diagonal().copy_(diagonal.flip(0))
    return torch.linalg.cholesky(reverse)


def triangular_inverse(upper: torch.Tensor, base: int = 64) -> torch.Tensor:
    """Inverse of an upper triangular matrix by halves, into one new matrix."""
    inverse = torch.zeros_like(upper)
    work = [(0, len(upper))]
    parts = []
    while work:  # halves before the whole: parts is used from its end
        start, end = work.pop()
        parts.append((start, end))
        if end - start > base:
            middle = (start + end) // 2
            work += [(start, middle), (middle, end)]
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
    """See `secateur.repair.sparsegpt.sweep`."""
    upper = upper.contiguous()
    diagonal = upper.diagonal()
    inverse = torch.where(dead, torch.zeros_like(diagonal), 1 / diagonal)
    rest = weight.clone(memory_format=torch.contiguous_format)
    masks = torch.zeros_like(weight, dtype=torch.bool)
    for start, end, zeros in shares(tuple(weight.shape), pattern, sparsity, band):
        here = rest[:, start:end]
        if not isinstance(pattern, NM):
            masks[:, start:end] = choose((here * inverse[start:end]).square(), pattern, zeros)
        band_of = _native_band if _fits(weight) else _sweep_band
        errors = band_of(here, masks[:, start:end], upper[start:end, start:end], inverse[start:end], pattern)
        if end < weight.shape[1]:
            rest[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return rest, masks


def _sweep_band(
    here: torch.Tensor, mask: torch.Tensor, upper: torch.Tensor, inverse: torch.Tensor, pattern: Any
) -> torch.Tensor:
    """Sweep over the columns of a band, in place in `here` (and, for N:M, in `mask`); the errors that it leaves."""
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
    """Whether the compiled loops take the tensors: in main memory, all float32 or all float64."""
    kinds = {t.dtype for t in tensors}
    fits = all(t.device.type == "cpu" for t in tensors) and kinds in ({torch.float32}, {torch.float64})
    return fits and kernels() is not None


def _native_band(
    here: torch.Tensor, mask: torch.Tensor, upper: torch.Tensor, inverse: torch.Tensor, pattern: Any
) -> torch.Tensor:
    """`_sweep_band` in the compiled loop."""
    native = kernels()
    assert native is not None
    keep = mask.to(torch.uint8, copy=True).contiguous()
    errors = torch.empty(here.shape, dtype=here.dtype)
    inverse = inverse.contiguous()
    keeps, of = (pattern.keep, pattern.of) if isinstance(pattern, NM) else (0, 0)
    native.repair_sweep(
        here.data_ptr(),
        here.stride(0),
        *here.shape,
        upper.data_ptr(),
        upper.stride(0),
        inverse.data_ptr(),
        keep.data_ptr(),
        keeps,
        of,
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
    """See `secateur.repair.swaps.swap_pass`."""
    patterns = patterns_of(pattern)
    if not _fits(values, dense, corr) or not (isinstance(pattern, Element) or patterns is not None):
        return pure_swap_pass(values, dense, corr, mask, dead, pattern)
    native = kernels()
    assert native is not None
    corr, left = corr.contiguous(), (dense - values) @ corr
    values = values.contiguous().clone()
    rows, inputs = values.shape
    wide, threads = values.dtype == torch.float64, torch.get_num_threads()
    if patterns is not None:
        kept = mask.to(torch.uint8, copy=True).contiguous()
        inverses = inverses_of(corr, patterns, pattern.of).contiguous()
        ways = torch.from_numpy(patterns)
        changed = native.repair_group(
            corr.data_ptr(),
            rows,
            inputs,
            slack_of(values),
            values.data_ptr(),
            left.data_ptr(),
            kept.data_ptr(),
            pattern.keep,
            pattern.of,
            ways.data_ptr(),
            len(ways),
            inverses.data_ptr(),
            wide,
            threads,
            0,
        )
        return values, kept.bool(), changed
    kept = (mask & ~dead).to(torch.uint8).contiguous()
    opened = (~mask & ~dead).to(values.dtype).contiguous()
    largest = (corr - torch.eye(inputs, dtype=corr.dtype)).abs().amax(1).contiguous()
    changed = native.repair_swap(
        corr.data_ptr(),
        largest.data_ptr(),
        rows,
        inputs,
        slack_of(values),
        values.data_ptr(),
        left.data_ptr(),
        opened.data_ptr(),
        kept.data_ptr(),
        wide,
        threads,
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
    """See `secateur.repair.least_squares.refit`; rows that are done leave the products."""
    keep = mask.to(values.dtype)
    tolerance = default_tolerance(values) if tolerance is None else tolerance
    values = values * keep
    goal = (keep * (dense @ corr)).square().sum(1) * tolerance**2
    left = keep * ((dense - values) @ corr)
    size = left.square().sum(1)
    busy = size > goal
    direction, at = left, torch.arange(len(values), device=values.device)
    for _ in range(steps):
        if not busy.any():
            break
        if busy.sum() < 0.8 * len(busy):
            at, keep, goal, left, direction, size = (t[busy] for t in (at, keep, goal, left, direction, size))
            busy = size > goal
        image = keep * (direction @ corr)
        below = (direction * image).sum(1)
        good = busy & (below > 0)
        step = torch.where(good, size / below.where(good, 1), 0)[:, None]
        values.index_add_(0, at, step * direction)
        left = left - step * image
        after = left.square().sum(1)
        direction = left + torch.where(good, after / size.where(good, 1), 0)[:, None] * direction
        size = after
        busy = size > goal
    return values


def solve_positive(corr: torch.Tensor, rho: float, right: torch.Tensor) -> torch.Tensor:
    """See `secateur.repair.alps.solve_positive`."""
    shifted = corr.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(shifted)).T
