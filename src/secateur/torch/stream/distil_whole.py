"""Distillation of a whole pruned model: its kept weights are tuned to the answers of the dense model.

Minimises KL(dense || pruned) over next-token probabilities (Hinton et al., 2015), and on request the relative error of
the hidden states too, by Adam (Kingma and Ba, 2015) with a warm-up and a cosine. It reads the calibration windows and
no labels. The whole model is in memory, with gradients and moments: see
`secateur.torch.stream.memory_plan.whole_model`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from secateur.errors import DataError, PlanError
from secateur.recipe import Distillation, Recipe
from secateur.torch.base.compute_type import products_in
from secateur.torch.blockwise.output_error import first_tensor, relative_error
from secateur.torch.blockwise.reconstruct import BETAS, masked_step
from secateur.torch.data.run_windows import chunks
from secateur.torch.data.token_windows import batches_of

NO_TENSOR = "the model returns no tensor, so it has no answers to learn"


def retrain(
    model: Any,
    dense: Any,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    options: Distillation,
    *,
    low_precision: bool,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[float, float]:
    """Tune parameters of a pruned model in place; zeros stay zero. Returns the mean loss of the first and of the last
    pass through the batches (of all steps, where they are less than a pass).

    names: the parameters.
    batches: keyword arguments of both models.
    low_precision: products in bfloat16 (see `secateur.torch.base.compute_type`); weights and moments stay in float32.
    seed: decides the order of the batches.
    progress: gets step, steps and loss.

    Raises DataError when the loss is NaN or infinite.
    """
    steps = steps_of(len(batches), options.passes)
    by_name = dict(model.named_parameters())
    parameters = [by_name[name] for name in names]
    zeros = [p.detach() == 0 for p in parameters]
    model.requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam(parameters, lr=options.rate, betas=BETAS, fused=True)
    order = order_of(len(batches), steps, seed)
    again = set() if options.hidden else {index for index, times in Counter(order).items() if times > 1}
    teacher = _Teacher(dense, again)
    losses = []
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        for step, index in enumerate(order):
            losses.append(
                _accumulate(model, teacher, index, batches[index], options.hidden, low_precision=low_precision)
            )
            if not math.isfinite(losses[-1]):
                raise DataError(f"distillation diverged at step {step + 1}; lower its rate ({options.rate})")
            for group in optimizer.param_groups:
                group["lr"] = options.rate * share_of(step, steps, options.warmup)
            masked_step(optimizer, parameters, zeros)
            if progress:
                progress(step + 1, steps, losses[-1])
    finally:
        for parameter in parameters:
            parameter.requires_grad = False
            parameter.grad = None
    part = min(len(batches), steps)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def steps_of(batches: int, passes: float) -> int:
    """How many steps a number of passes through the batches takes."""
    return max(1, round(passes * batches))


def coming_again(batches: int, passes: float) -> int:
    """How many of the batches are read more than once."""
    return min(batches, max(0, steps_of(batches, passes) - batches))


def order_of(batches: int, steps: int, seed: int) -> list[int]:
    """The batch of each step: all batches in random order, then in another random order, and so on."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()[::-1]
    return order[:steps]


class _Teacher:
    """The answers of the dense model.

    For batches in `again` it keeps the input of the output layer, where the logits are the output of that layer, so
    that only that layer runs the next time.
    """

    def __init__(self, dense: Any, again: set[int]) -> None:
        self.dense, self.again = dense, again
        self.head = _output_layer(dense)
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, index: int, inputs: Mapping[str, Any]) -> Any:
        """The output for a batch, or an object with its logits alone; the caller has entered `products_in`."""
        if index in self.states:
            return SimpleNamespace(logits=self.head(self.states[index]))
        if self.head is None or index not in self.again:
            return self.dense(**inputs)
        seen: list[tuple[Any, Any]] = []
        handle = self.head.register_forward_hook(lambda layer, args, output: seen.append((args, output)))
        try:
            output = self.dense(**inputs)
        finally:
            handle.remove()
        if len(seen) == 1 and len(seen[0][0]) == 1 and getattr(output, "logits", None) is seen[0][1]:
            self.states[index] = seen[0][0][0].clone()
        return output


def _output_layer(model: Any) -> Any:
    """The layer that computes the logits, or None where the model does not name one."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def share_of(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate at a step: rising over `warmup` steps, then falling along a cosine."""
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _accumulate(
    model: Any, teacher: _Teacher, index: int, batch: Mapping[str, Any], hidden: float, *, low_precision: bool
) -> float:
    """Add the gradient of one batch; returns its loss. hidden: the weight of the error of the hidden states."""
    inputs = {**batch, "output_hidden_states": True} if hidden else dict(batch)
    with torch.no_grad(), products_in(low_precision=low_precision):
        wanted = teacher(index, inputs)
    with torch.enable_grad(), products_in(low_precision=low_precision):
        output = model(**inputs)
        error = _states_error(output, wanted, hidden) if hidden else None
    loss, outputs, gradients = 0.0, [], []
    logits = getattr(output, "logits", None)
    if logits is not None and logits.dim() == 3:
        loss, gradient = divergence(logits, wanted.logits)
        outputs.append(logits)
        gradients.append(gradient)
    elif error is None:
        error = relative_error(first_tensor(output, NO_TENSOR), first_tensor(wanted, NO_TENSOR))
    if error is not None:
        loss += float(error.detach())
        outputs.append(error)
        gradients.append(torch.ones_like(error))
    torch.autograd.backward(outputs, gradients)
    return loss


@torch.no_grad()
def divergence(logits: torch.Tensor, dense: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(dense || model) over positions, and its gradient by the logits: (softmax - dense softmax) / positions.

    The gradient is written over `dense` where the two have the same type.
    """
    mine, theirs = logits.reshape(-1, logits.shape[-1]), dense.reshape(-1, dense.shape[-1])
    gradient = theirs if theirs.dtype == mine.dtype else torch.empty_like(mine)
    total = 0.0
    for part in chunks(len(mine)):
        q, p = mine[part].float().log_softmax(-1), theirs[part].float().log_softmax(-1)
        mass = p.exp()
        total += float((mass * (p - q)).sum(dtype=torch.float64))
        gradient[part] = (q.exp_() - mass).div_(len(mine))
    return total / len(mine), gradient.view_as(logits)


def _states_error(output: Any, wanted: Any, hidden: float) -> torch.Tensor | None:
    """`hidden` times the mean relative error of the hidden states; None where the model returns none."""
    pairs = []
    for field in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        pairs += list(zip(getattr(output, field, None) or (), getattr(wanted, field, None) or (), strict=False))[1:]
    if not pairs:
        return None
    errors = [relative_error(mine, theirs) for mine, theirs in pairs]
    return hidden * torch.stack(errors).mean()


def distil(
    model: Any,
    dense: Any,
    blocks: Sequence[Mapping[str, Any]],
    windows: torch.Tensor,
    recipe: Recipe,
    *,
    stored: Callable[[str], torch.dtype],
    low_precision: bool,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[float, float]:
    """`retrain` with the options of a recipe; counts the zeros anew in the records of the blocks.

    blocks: records (see `run_result.record_of`) of the blocks whose weights are tuned.
    stored: weight -> the type to which it is rounded at the end.
    low_precision: whether products are in bfloat16, where the recipe does not say it.
    progress: gets step, steps and loss.
    """
    options = recipe.distil
    if options is None:
        raise PlanError("the recipe asks for no distillation")
    layers = {layer["name"]: layer for block in blocks for layer in block["layers"]}
    low = low_precision if options.bfloat16 is None else options.bfloat16
    batches = batches_of(model, windows, min(options.windows, len(windows)))
    losses = retrain(
        model, dense, list(layers), batches, options, low_precision=low, seed=recipe.seed, progress=progress
    )
    with torch.no_grad():
        for name, layer in layers.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.to(stored(name)).to(parameter.dtype))
            layer["zeros"] = int((parameter == 0).sum())
    return losses
