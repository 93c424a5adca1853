"""Block reconstruction: tune the kept weights of one block so that its output is the dense model's again.

Minimises |f(x; M w) - y|^2 / |y|^2, token by token, over the kept weights w, with x the states that the pruned model
hands to the block and y the output of the same block in the dense model (arXiv 2510.14444), by Adam (Kingma and Ba,
2015).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError, ModelError
from secateur.torch.base.compute_type import products_in
from secateur.torch.shrink.masking import first_of
from secateur.torch.train.hold import zero

BETAS = (0.9, 0.98)
"""Of Adam, for a few dozen to a few hundred steps."""


def reconstruct(
    block: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: int,
    call: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]],
    target: Callable[[int], torch.Tensor],
    *,
    passes: float,
    rate: float,
    low_precision: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Tune the parameters of a block in place; zeros stay zero. Returns its relative error before and after.

    call: arguments of the block for a batch; target: the first tensor that it shall return for it. passes: how often
    each batch is seen. rate: the first step relative to the root mean square of each parameter's kept values; steps
    shrink along a cosine. low_precision: products in bfloat16. The error is `relative_error` over some of the batches.
    """
    steps = max(1, round(passes * batches))
    gone, groups = [], []
    for parameter in parameters.values():
        gone.append(parameter.detach() == 0)
        kept = max(parameter.numel() - int(gone[-1].sum()), 1)
        size = float((parameter.detach().square().sum() / kept).sqrt())
        parameter.requires_grad_(True)
        groups.append({"params": [parameter], "lr": rate * size, "whole": rate * size})
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True)
    generator = torch.Generator().manual_seed(seed)
    before = error_of(block, batches, call, target)
    order: list[int] = []
    try:
        for step in range(steps):
            order = order or torch.randperm(batches, generator=generator).tolist()
            index = order.pop()
            args, kwargs = call(index)
            with torch.enable_grad(), products_in(low_precision=low_precision):
                output = _stream(block(*args, **kwargs))
                relative_error(output, target(index)).backward()
            for group in optimizer.param_groups:
                group["lr"] = group["whole"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            masked_step(optimizer, parameters.values(), gone)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return before, error_of(block, batches, call, target)


@torch.no_grad()
def masked_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], gone: Iterable[torch.Tensor]
) -> None:
    """One step in which what is `gone` has no gradient and stays zero."""
    for parameter, zeros in zip(parameters, gone, strict=True):
        if parameter.grad is not None:
            zero(parameter.grad, zeros)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def error_of(block: nn.Module, batches: int, call: Any, target: Callable[[int], torch.Tensor]) -> float:
    """`relative_error` over a few of the batches."""
    wrong = total = 0.0
    for index in range(0, batches, max(1, batches // 8)):
        args, kwargs = call(index)
        wanted = target(index)
        wrong += float(relative_error(_stream(block(*args, **kwargs)), wanted))
        total += 1
    if not math.isfinite(wrong):
        raise DataError("the output of a block is NaN or infinite; look for huge activations of the model on this text")
    return wrong / total if total else 0.0


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - wanted|^2 / |wanted|^2, each token relative to its own size: the norm before the
    next layer takes the size away, and the few tokens of huge size would be all that counts otherwise.
    """
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def _stream(output: Any) -> torch.Tensor:
    found = first_of(output)
    if found is None:
        raise ModelError("a block returns no tensor, so it has no output to be tuned to")
    return found
