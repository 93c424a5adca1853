"""A sparsity for each weight matrix, by what an error in its output costs in the loss of the model.

The error e_i(s) of a matrix is that of the share s of its weights with the lowest Wanda scores (Sun et al., 2024), the
sum of w^2 E[x^2]. Its cost is the mean of two estimates. One is half the mean squared gradient of the loss at the
output of the matrix in the dense model, with labels drawn from the model's own answers (the Fisher information): it is
steady, but sees each matrix alone. The other is what KL(dense || pruned) gains between a trial, pruned by SparseGPT
with the same share everywhere, and the dense matrix: it sees all errors together, but is noisy.
`secateur.budget.least_loss` minimises the sum.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.budget import least_loss
from secateur.errors import ModelError, PlanError
from secateur.layout import Layout
from secateur.recipe import Recipe
from secateur.select import rows_of
from secateur.torch.blockwise.block_calls import block_paths
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.prune_block import counted
from secateur.torch.blockwise.walk import Run
from secateur.torch.data.token_windows import batches_of
from secateur.torch.stats.linear_inputs import input_of
from secateur.torch.stream.block_shares import exact
from secateur.torch.stream.distil_whole import divergence

Step = Callable[[], None]
"""Called after each step."""
STEPS = 60
"""Steps of the error curves, between the least and the greatest share."""


def by_sensitivity(
    model: Any,
    layout: Layout,
    windows: torch.Tensor,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Sparsity of each weight of `counted`; together they lose round(sparsity * number of weights) weights.

    model: dense, in float32, in evaluation, without gradients; it is not changed.
    progress: gets step and steps; each window is two of them, and each block of the trial is one.

    Raises ModelError for a model without next-token logits.
    """
    options, sparsity = recipe.sensitivity, recipe.stated_sparsity
    if options is None:
        raise PlanError("the recipe asks for no sensitivity")
    batches = batches_of(model, windows[: options.windows], 1)
    paths = block_paths(layout)
    modules = {n: m for p in paths for n, m in counted(layout, model, p).items()}
    steps = iter(range(1, 2 * len(batches) + len(paths) + 1))

    def step() -> None:
        if progress:
            progress(next(steps), 2 * len(batches) + len(paths))

    fisher, squares = _fisher(model, modules, batches, recipe.seed, step)
    trial = _trial(model, layout, batches, recipe, step)
    gains = _gains(model, trial, list(modules), batches, step)
    del trial
    low, high = max(sparsity - options.spread, 0.0), sparsity + options.spread
    shares = np.unique(np.append(np.linspace(low, min(high, 0.99), STEPS + 1), sparsity))
    now = int(np.flatnonzero(shares == sparsity)[0])
    errors, costs = [], []
    for name, module in modules.items():
        curve = _curve(rows_of(module.weight.detach(), layout.linears[name].in_dim), squares[name], shares)
        errors.append(curve)
        costs.append(0.25 * fisher[name] + 0.25 * max(gains[name], 0.0) / max(float(curve[now]), 1e-30))
    sizes = {name: module.weight.numel() for name, module in modules.items()}
    by_weight = least_loss(np.array(errors), shares, np.array(list(sizes.values())), np.array(costs), sparsity)
    return exact({name: ({name: sizes[name]}, float(s)) for name, s in zip(sizes, by_weight, strict=True)}, sparsity)


def _curve(weight: torch.Tensor, squares: torch.Tensor, shares: np.ndarray) -> np.ndarray:
    """Error (steps,) of the lowest shares of the squared Wanda scores of a weight (out, in). squares: E[x^2], (in,)."""
    scores = weight.square() * squares
    sums = np.concatenate([[0.0], np.cumsum(np.sort(scores.reshape(-1).numpy()), dtype=np.float64)])
    return np.interp(shares * (len(sums) - 1), np.arange(len(sums)), sums)


def _trial(model: Any, layout: Layout, batches: list[dict[str, Any]], recipe: Recipe, step: Step) -> Any:
    """A copy of the model that SparseGPT has pruned by the same share everywhere."""
    trial = copy.deepcopy(model)
    plain: dict[str, Any] = {"criterion": "sparsegpt", "options": {}, "reconstruct": None, "distil": None}
    run = Run(trial, layout, batches, recipe.model_copy(update=plain), States(None))
    with torch.no_grad():
        while len(run.finished) < run.total:
            path = run.next_block()
            run.prune(path, lambda name: torch.float32)
            if len(run.finished) + 1 < run.total:
                run.advance("pruned", trial.get_submodule(path))
            run.close(path)
            step()
    return trial


def _fisher(
    model: Any, modules: Mapping[str, nn.Module], batches: list[dict[str, Any]], seed: int, step: Step
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Mean squared gradient at the output of each weight, and mean squares of its inputs, (in,)."""
    generator = torch.Generator().manual_seed(seed)
    fisher = dict.fromkeys(modules, 0.0)
    squares = {name: torch.zeros(()) for name in modules}
    handles = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            x = input_of(module, args, kwargs).detach()
            squares[name] = squares[name] + x.reshape(-1, x.shape[-1]).square().mean(0) / len(batches)

            def add(gradient: torch.Tensor) -> None:
                tokens = gradient.numel() // gradient.shape[-1]
                fisher[name] += float(gradient.square().sum(dtype=torch.float64)) / (
                    tokens * gradient.shape[-1] * len(batches)
                )

            output.register_hook(add)

        return look

    try:
        for name, module in modules.items():
            module.weight.requires_grad_()
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        for batch in batches:
            with torch.enable_grad():
                logits = _logits(model, batch)
                probabilities = logits.detach().log_softmax(-1).exp()
                labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            for module in modules.values():
                module.weight.grad = None
            del logits, probabilities, labels  # free their memory before the next window
            step()
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.weight.requires_grad = False
    return fisher, squares


def _gains(model: Any, trial: Any, names: list[str], batches: list[dict[str, Any]], step: Step) -> dict[str, float]:
    """By how much KL(dense || trial) falls, to first order, when a weight of the trial becomes the dense one."""
    parameters = {name: trial.get_parameter(name).requires_grad_() for name in names}
    for batch in batches:
        with torch.no_grad():
            wanted = _logits(model, batch)
        with torch.enable_grad():
            logits = _logits(trial, batch)
        _, gradient = divergence(logits, wanted)
        logits.backward(gradient.div_(len(batches)))
        del logits, wanted, gradient
        step()
    gains = {}
    for name, parameter in parameters.items():
        change = model.get_parameter(name) - parameter.detach()
        gains[name] = 0.0 if parameter.grad is None else -float((parameter.grad * change).sum(dtype=torch.float64))
    return gains


def _logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits (tokens, vocabulary) in float32; ModelError for a model without them."""
    logits = getattr(model(**batch), "logits", None)
    if logits is None or logits.dim() != 3:
        raise ModelError("sensitivity needs a model that gives logits for every token; use owl for this one")
    return logits.reshape(-1, logits.shape[-1]).float()
