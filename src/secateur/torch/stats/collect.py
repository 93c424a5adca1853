"""collect: run a PyTorch model over data and sum the quantities that criteria ask for, without padding."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.errors import DataError
from secateur.layout import Layout, sum_by_owner
from secateur.stats import NEEDS_GRADIENT, OF_AXIS, OF_DIVERGENCE, OF_WEIGHT, Stats, Tally
from secateur.torch.base.batches import IGNORED, call, evaluating, run, size_of, to_device, with_decoder_inputs
from secateur.torch.stats.attention_scores import observe_attention
from secateur.torch.stats.experts import watch_experts
from secateur.torch.stats.grams import watch_grams
from secateur.torch.stats.linear_inputs import before_calls, input_of, linear_modules, real_rows
from secateur.torch.stats.padding import Padding, TokenMask

Loss = Callable[[nn.Module, Any], torch.Tensor]


def collect(
    model: nn.Module,
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    needs: Collection[str],
    data: Iterable[Any],
    *,
    axes: Sequence[str] | None = None,
    loss: Loss | None = None,
    weights: Sequence[str] | None = None,
) -> Stats:
    """Sum the quantities `needs` over the batches, in evaluation mode.

    axes: the axes whose unit quantities are wanted (default: all that can be pruned).
    loss: `loss(model, batch)`, for models that compute none.
    weights: the linear weights whose grams are wanted (default: all).

    Raises DataError when there is no batch, or when a gradient is asked for and the model returns no loss.
    """
    wanted = set(needs)
    unknown = wanted - ({*OF_WEIGHT, *OF_AXIS} - OF_DIVERGENCE)
    if unknown:
        raise DataError(f"the torch host cannot collect {sorted(unknown)[0]!r}")
    if axes is None:
        axes = [axis.name for axis in layout.axes.values() if not axis.frozen]
    gradients = wanted & NEEDS_GRADIENT
    tally, padding = Tally(), Padding(layout, model)
    stream = (with_decoder_inputs(model, to_device(batch, model)) for batch in data)
    first = list(islice(stream, 1))
    shifted = bool(gradients and first) and loss is None and _shifts_labels(model, first[0])
    batches = 0
    with evaluating(model), _gradients_on(parameters) if gradients else contextlib.nullcontext():
        for batch in chain(first, stream):
            padding.see(batch)
            # The model is watched in this pass only: what makes the next batch may run it too, for labels.
            with _watching(model, layout, wanted, axes, weights, tally, padding):
                if gradients:
                    items = size_of(batch) if loss is not None else _labels_in(batch, shifted=shifted)
                    _backward(model, batch, loss)
                    _add_gradients(layout, parameters, gradients, axes, tally, items)
                else:
                    with torch.no_grad():
                        run(model, batch)
            batches += 1
    if not batches:
        raise DataError("the data is empty: no batch was seen; pass at least one")
    padding.report()
    return tally.stats()


@contextlib.contextmanager
def _watching(
    model: nn.Module,
    layout: Layout,
    wanted: set[str],
    axes: Sequence[str],
    weights: Sequence[str] | None,
    tally: Tally,
    token_mask: TokenMask,
) -> Iterator[None]:
    """While the context lasts, every forward pass adds the wanted quantities that need no gradient to `tally`."""
    attention = {need for need in wanted if need.startswith("attn_")}
    with contextlib.ExitStack() as stack:
        if attention:
            stack.enter_context(observe_attention(model, layout, attention, tally, token_mask))
        if wanted & {"expert_routed", "expert_output"}:
            stack.enter_context(watch_experts(model, layout, axes, wanted, tally, token_mask))
        if wanted & {"act_sq", "unit_act"}:
            stack.enter_context(_watch_inputs(model, layout, wanted, axes, tally, token_mask))
        if "gram" in wanted:
            stack.enter_context(watch_grams(linear_modules(model, layout), layout.readers(weights), tally, token_mask))
        yield


@torch.no_grad()
def _shifts_labels(model: nn.Module, batch: Any) -> bool:
    """Whether the first label of a row has no part in the loss, as where each token is predicted from those before it.

    The model runs once on labels of which only the first of each row counts, and its loss shows it.
    """
    labels = _labels_of(batch)
    if labels is None or labels.dim() != 2 or labels.shape[1] < 2:
        return False
    first_only = torch.full_like(labels, IGNORED)
    first_only[:, 0] = labels[:, 0].clamp_min(0)
    with evaluating(model):
        value = getattr(call(model, {**batch, "labels": first_only}), "loss", None)
    return value is not None and not (bool(value.isfinite().all()) and bool(value.any()))


def _labels_of(batch: Any) -> torch.Tensor | None:
    """The labels of a batch where they are class numbers, else None."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None


def _labels_in(batch: Any, *, shifted: bool) -> int:
    """The number of items over which the model's own loss is the mean: class labels that count, else examples.

    shifted: the first label of each row does not count.
    """
    labels = _labels_of(batch)
    if labels is None or not labels.dim():
        return size_of(batch)
    count = int(((labels[:, 1:] if shifted and labels.dim() == 2 else labels) != IGNORED).sum())
    if not count:
        raise DataError(f"no label of a batch counts: all are {IGNORED}, or the only ones are first in their rows")
    return count


def _backward(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    """One backward pass; DataError without a loss, or for one that is not a finite number."""
    if loss is not None:
        value = loss(model, batch)
    else:
        value = getattr(call(model, batch), "loss", None)
    if value is None:
        raise DataError("gradients need a loss: pass labels in each batch, or loss=callable to secateur.open")
    if value.dim():
        raise DataError(f"the loss has shape {tuple(value.shape)}; it must be one number, the mean over the batch")
    if not value.isfinite():
        raise DataError(
            f"the loss is {float(value.detach())} on this data; look for NaN or huge weights, or wrong labels"
        )
    value.backward()


@contextlib.contextmanager
def _gradients_on(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Every floating-point parameter takes a gradient; flags and gradients are restored at the end."""
    floating = [p for p in parameters.values() if p.is_floating_point()]
    before = [(p, p.requires_grad, p.grad) for p in floating]
    try:
        for p in floating:
            p.requires_grad_()
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for p, required, grad in before:
            p.requires_grad = required
            p.grad = grad


def _add_gradients(
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    wanted: set[str],
    axes: Sequence[str],
    tally: Tally,
    items: int,
) -> None:
    """Add the gradients of one backward pass, and clear them. items: the number over which the loss is the mean."""
    products: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        grad = parameter.grad
        if grad is None or name not in layout.params:
            continue
        grad = grad.detach().float()
        if "grad" in wanted:
            tally.add("grad", name, grad * items, items)
        if "grad_sq" in wanted:
            tally.add("grad_sq", name, grad.square(), 1)
        if "unit_grad_sq" in wanted and name in layout.linears:
            products[name] = grad * parameter.detach().float()
        parameter.grad = None
    tally.add_gates(layout, products, axes)


@contextlib.contextmanager
def _watch_inputs(
    model: nn.Module,
    layout: Layout,
    wanted: set[str],
    axes: Sequence[str],
    tally: Tally,
    token_mask: TokenMask,
) -> Iterator[None]:
    """While the context lasts, every forward pass adds "act_sq" and "unit_act", where they are wanted, to `tally`."""
    modules = linear_modules(model, layout)
    hooks = []
    for param, linear in layout.linears.items():
        owners = {}
        for axis in axes if "unit_act" in wanted else ():
            owner = layout.owners(param, axis)[linear.in_dim]
            if owner is not None:
                owners[axis] = owner
        if "act_sq" in wanted or owners:
            for path, module in modules.get(param, {}).items():
                hooks.append((module, _InputHook(layout, param, path, "act_sq" in wanted, owners, tally, token_mask)))
    with before_calls(hooks):
        yield


@dataclass(frozen=True, eq=False)
class _InputHook:
    """Adds what a linear weight reads in one module to a tally.

    squares: whether "act_sq" is wanted.
    owners: axis -> the unit that owns each input (see `Layout.owners`), for axes whose "unit_act" is wanted.
    """

    layout: Layout
    param: str
    path: str
    squares: bool
    owners: Mapping[str, np.ndarray]
    tally: Tally
    token_mask: TokenMask

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.layout.shape(self.param)[self.layout.linears[self.param].in_dim]
        rows = real_rows(self.path, input_of(module, args, kwargs), inputs, self.token_mask)
        if rows is None:
            return
        if self.squares:
            self.tally.add("act_sq", self.param, rows.square().sum(0), rows.shape[0])
        if self.owners:
            magnitude = to_numpy(rows.abs().sum(0))
            for axis, owner in self.owners.items():
                units = sum_by_owner(owner, magnitude, self.layout.axis(axis).size)
                self.tally.add("unit_act", axis, units, rows.shape[0])
