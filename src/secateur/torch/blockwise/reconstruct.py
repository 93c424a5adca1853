"""Block reconstruction: tunes the kept weights of one block until its output is close to that of the dense block.

Minimises |f(x; M w) - y|^2 / |y|^2, token by token, over the kept weights w, where x are the states that the pruned
model gives to the block and y is the output of the same block in the dense model (arXiv 2510.14444), by Adam (Kingma
and Ba, 2015).
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from secateur.errors import DataError
from secateur.torch.base.compute_type import products_in
from secateur.torch.blockwise.block_calls import BlockCall
from secateur.torch.blockwise.output_error import first_tensor, relative_error
from secateur.torch.train.hold import zero

BETAS = (0.9, 0.98)
"""Decay rates of Adam, for a few dozen to a few hundred steps."""

NO_TENSOR = "a block returns no tensor, so it has no output to be tuned to"


def reconstruct(
    block: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: int,
    call: Callable[[int], BlockCall],
    target: Callable[[int], torch.Tensor],
    *,
    passes: float,
    rate: float,
    low_precision: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Tune the parameters of a block in place; zeros stay zero. Returns `error_of` before and after.

    batches: their number.
    call: number of a batch -> the call of the block for it.
    target: number of a batch -> the first tensor that the block should return for it.
    passes: how often each batch is read.
    rate: the first step, relative to the root mean square of the kept values of each parameter; steps shrink along a
        cosine.
    low_precision: products in bfloat16.
    seed: decides the order of the batches.
    """
    steps = max(1, round(passes * batches))
    zeros, groups = [], []
    for parameter in parameters.values():
        zeros.append(parameter.detach() == 0)
        kept = max(parameter.numel() - int(zeros[-1].sum()), 1)
        size = float((parameter.detach().square().sum() / kept).sqrt())
        parameter.requires_grad_()
        groups.append({"params": [parameter], "lr": rate * size, "whole": rate * size})
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, fused=True)
    generator = torch.Generator().manual_seed(seed)
    before = error_of(block, batches, call, target)
    order: list[int] = []
    try:
        for step in range(steps):
            order = order or torch.randperm(batches, generator=generator).tolist()
            index = order.pop()
            block_call = call(index)
            with torch.enable_grad(), products_in(low_precision=low_precision):
                output = first_tensor(block_call.run(block), NO_TENSOR)
                relative_error(output, target(index)).backward()
            for group in optimizer.param_groups:
                group["lr"] = group["whole"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            masked_step(optimizer, parameters.values(), zeros)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad = False
            parameter.grad = None
    return before, error_of(block, batches, call, target)


@torch.no_grad()
def masked_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], zeros: Iterable[torch.Tensor]
) -> None:
    """One step of the optimizer. zeros: for each parameter, True where it has no gradient and stays zero."""
    for parameter, pruned in zip(parameters, zeros, strict=True):
        if parameter.grad is not None:
            zero(parameter.grad, pruned)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def error_of(
    block: nn.Module, batches: int, call: Callable[[int], BlockCall], target: Callable[[int], torch.Tensor]
) -> float:
    """Mean `relative_error` of the output of a block over 8 to 15 of the batches, or all where there are fewer.

    DataError where it is NaN or infinite.
    """
    indices = range(0, batches, max(1, batches // 8))
    total = 0.0
    for index in indices:
        block_call = call(index)
        wanted = target(index)
        total += float(relative_error(first_tensor(block_call.run(block), NO_TENSOR), wanted))
    if not math.isfinite(total):
        raise DataError("the output of a block is NaN or infinite; look for huge activations of the model on this text")
    return total / len(indices) if indices else 0.0
