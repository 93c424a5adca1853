"""A sparsity for each block, by a first walk through the dense model.

OWL (Yin et al., 2024): blocks with many outlying Wanda scores keep more; see `secateur.budget.owl`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.budget import outliers, owl
from secateur.criteria.wanda import wanda
from secateur.recipe import Allocation
from secateur.select import rows_of
from secateur.torch.blockwise.prune_block import counted
from secateur.torch.blockwise.walk import Run
from secateur.torch.stats.linear_inputs import InputHook, before_calls, input_of


def by_outliers(
    run: Run,
    options: Allocation,
    sparsity: float,
    *,
    load: Callable[[str], None] | None = None,
    release: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Sparsity of each weight of `counted`; together they lose round(sparsity * number of weights) weights.

    run: a walk that has not begun, and cannot be used afterwards.
    load, release: fill and empty a block, for a model that is not in memory.
    progress: gets step and steps.
    """
    shares, sizes, weights = [], [], {}
    while len(run.finished) < run.total:
        path = run.next_block()
        if load:
            load(path)
        modules = counted(run.layout, run.model, path)
        scores = _scores(run, path, modules)
        pooled = np.concatenate(list(scores.values()))
        shares.append(outliers(pooled, options.multiple))
        sizes.append(len(pooled))
        weights[path] = {name: len(part) for name, part in scores.items()}
        run.close(path)
        if release:
            release(path)
        if progress:
            progress(len(run.finished), run.total)
    by_block = owl(np.array(shares), sparsity, options.spread, np.array(sizes))
    return exact({path: (weights[path], share) for path, share in zip(weights, by_block, strict=True)}, sparsity)


@torch.no_grad()
def _scores(run: Run, path: str, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """Wanda scores of each weight of a block, flat; runs all batches through the block."""
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str) -> InputHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(module, args, kwargs).detach()
            squares[name] = squares.get(name, torch.zeros(())) + x.reshape(-1, x.shape[-1]).float().square().sum(0)

        return hook

    with before_calls((module, watch(name)) for name, module in modules.items()):
        run.advance("pruned", run.model.get_submodule(path))
    scores = {}
    for name, module in modules.items():
        weight = rows_of(module.weight.detach(), run.layout.linears[name].in_dim)
        scores[name] = wanda(weight, squares[name]).reshape(-1).numpy()
    return scores


def exact(blocks: Mapping[str, tuple[Mapping[str, int], float]], sparsity: float) -> dict[str, float]:
    """Sparsity of each weight, rounded so that all zeros together are round(sparsity * number of weights).

    blocks: block -> sizes of its weights, and its sparsity.
    """
    sizes = {name: size for weights, _ in blocks.values() for name, size in weights.items()}
    zeros = {name: round(size * share) for weights, share in blocks.values() for name, size in weights.items()}
    over = sum(zeros.values()) - round(sum(sizes.values()) * sparsity)
    for name in list(zeros)[: abs(over)]:
        zeros[name] -= int(np.sign(over))
    return {name: count / sizes[name] for name, count in zeros.items()}
