"""How much each block loses when blocks are not treated alike: a first walk through the dense model, block by block.

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
from secateur.torch.blockwise.prune_block import counted
from secateur.torch.blockwise.walk import Run
from secateur.torch.stats.linear_inputs import input_of


def by_outliers(
    run: Run,
    options: Allocation,
    sparsity: float,
    load: Callable[[str], None],
    release: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Sparsity of each counted weight; together they lose round(sparsity * number of weights) weights.

    run: a fresh walk, which is used up. load, release: fill and empty a block of the model. progress: told step, steps.
    """
    shares, sizes, weights = [], [], {}
    while len(run.finished) < run.total:
        path = run.next_block()
        load(path)
        modules = counted(run.layout, run.model, path)
        scores = _scores(run, path, modules)
        pooled = np.concatenate(list(scores.values()))
        shares.append(outliers(pooled, options.multiple))
        sizes.append(len(pooled))
        weights[path] = {name: len(part) for name, part in scores.items()}
        run.close(path)
        release(path)
        if progress:
            progress(len(run.finished), run.total)
    found = owl(np.array(shares), sparsity, options.spread, np.array(sizes))
    return exact({path: (weights[path], share) for path, share in zip(weights, found, strict=True)}, sparsity)


@torch.no_grad()
def _scores(run: Run, path: str, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
    """Wanda scores of each weight of a block, flat; all batches are run through it."""
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(module, args, kwargs).detach()
            squares[name] = squares.get(name, torch.zeros(())) + x.reshape(-1, x.shape[-1]).float().square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        run.advance("pruned", run.model.get_submodule(path))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, module in modules.items():
        held = module.weight.detach()
        turned = run.layout.linears[name].in_dim == 0
        found[name] = wanda(held.T if turned else held, squares[name]).reshape(-1).numpy()
    return found


def exact(blocks: Mapping[str, tuple[Mapping[str, int], float]], sparsity: float) -> dict[str, float]:
    """Sparsity of each weight of given size such that the zeros of all add up to the stated number."""
    sizes = {name: size for weights, _ in blocks.values() for name, size in weights.items()}
    zeros = {name: round(size * share) for weights, share in blocks.values() for name, size in weights.items()}
    over = sum(zeros.values()) - round(sum(sizes.values()) * sparsity)
    for name in list(zeros)[: abs(over)]:
        zeros[name] -= int(np.sign(over))
    return {name: count / sizes[name] for name, count in zeros.items()}
