"""Fast forms of the inner loops of `secateur.repair` for torch tensors, equal to the pure ones.

On the CPU they run in the compiled kernels; without them, or on another device, in torch operations over all rows.
"""

import functools
import warnings
from types import ModuleType
from typing import Any

import torch

from secateur.repair.problem import choose
from secateur.repair.sparsegpt import shares
from secateur.runtime.native import load_native
from secateur.select import NM


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels when they have the loops of repair, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is slow here is not the sparse layers that the warning speaks of
        native = load_native()
    return native if native is not None and hasattr(native, "repair_sweep") else None


def sweep(
    weight: torch.Tensor, upper: torch.Tensor, dead: torch.Tensor, pattern: Any, sparsity: float, band: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `secateur.repair.sparsegpt.sweep`."""
    diagonal = upper.diagonal()
    inverse = torch.where(dead, torch.zeros_like(diagonal), 1 / diagonal)
    rest = weight.clone()
    masks = torch.zeros_like(weight, dtype=torch.bool)
    for start, end, zeros in shares(tuple(weight.shape), pattern, sparsity, band):
        here = rest[:, start:end]
        if not isinstance(pattern, NM):
            masks[:, start:end] = choose((here * inverse[start:end]).square(), pattern, zeros)
        errors = _sweep_band(here, masks[:, start:end], upper[start:end, start:end], inverse[start:end], pattern)
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
