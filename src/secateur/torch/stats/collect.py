"""collect: run a PyTorch model over data and sum up what the criteria ask for, padding left out."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.errors import DataError
from secateur.layout import Layout, sum_by_owner
from secateur.stats import NEEDS_GRADIENT, OF_AXIS, OF_WEIGHT, Stats, Tally
from secateur.torch.base.batches import IGNORED, evaluating, run, size_of, to_device, with_decoder_inputs
from secateur.torch.stats.attention_scores import observe_attention
from secateur.torch.stats.grams import input_of, linear_modules, real_rows, watch_grams
from secateur.torch.stats.padding import Padding, TokenMask

Loss = Callable[[nn.Module, Any], torch.Tensor]


def collect(
    model: nn.Module,
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    needs: Collection[str],
    data: Iterable[Any],
    axes: Sequence[str] | None = None,
    loss: Loss | None = None,
    weights: Sequence[str] | None = None,
) -> Stats:
    """Sum the quantities `needs` over the batches, in evaluation mode.

    weights: the linear weights whose grams are wanted (default: all).

    Raises DataError when there is no batch, or when a gradient is asked for and the model returns no loss.
    """
    wanted = set(needs)
    unknown = wanted - set(OF_WEIGHT) - set(OF_AXIS)
    if unknown:
        raise DataError(f"the torch host cannot collect {sorted(unknown)[0]!r}")
    if axes is None:
        axes = [axis.name for axis in layout.axes.values() if not axis.frozen]
    gradients = wanted & NEEDS_GRADIENT
    tally = Tally()
    padding = Padding(layout)
    stream = (with_decoder_inputs(model, to_device(batch, model)) for batch in data)
    first = list(islice(stream, 1))
    shifted = bool(gradients and first) and loss is None and _shifts_labels(model, first[0])
    batches = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        attention = {need for need in wanted if need.startswith("attn_")}
        if attention:
            stack.enter_context(observe_attention(model, layout, attention, tally, padding))
        if wanted & {"act_sq", "unit_act"}:
            stack.enter_context(_watch_inputs(model, layout, wanted, axes, tally, padding))
        if "gram" in wanted:
            stack.enter_context(watch_grams(linear_modules(model, layout), layout.readers(weights), tally, padding))
        if gradients:
            stack.enter_context(_gradients_on(parameters))
        for batch in chain(first, stream):
            padding.see(batch)
            if gradients:
                items = size_of(batch) if loss is not None else _labels_in(batch, shifted)
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


@torch.no_grad()
def _shifts_labels(model: nn.Module, batch: Any) -> bool:
    """Whether the first label of a row has no part in the loss, as where each token is to be told from those before it.

    The model is asked: it runs once with no other labels than the first of each row.
    """
    labels = _labels_of(batch)
    if labels is None or labels.dim() != 2 or labels.shape[1] < 2:
        return False
    alone = torch.full_like(labels, IGNORED)
    alone[:, 0] = labels[:, 0].clamp_min(0)
    with evaluating(model):
        value = getattr(model(**{**batch, "labels": alone}), "loss", None)
    return value is not None and not (bool(value.isfinite().all()) and bool(value.any()))


def _labels_of(batch: Any) -> torch.Tensor | None:
    """The labels of a batch where they are class numbers."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else None


def _labels_in(batch: Any, shifted: bool) -> int:
    """How many items the model's own loss is the mean over: class labels that count, else examples."""
    labels = _labels_of(batch)
    if labels is None or not labels.dim():
        return size_of(batch)
    count = int(((labels[:, 1:] if shifted and labels.dim() == 2 else labels) != IGNORED).sum())
    if not count:
        raise DataError(f"no label of a batch counts: all are {IGNORED}, or the only ones are first in their rows")
    return count


def _backward(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    if loss is not None:
        value = loss(model, batch)
    else:
        value = getattr(model(**batch) if isinstance(batch, Mapping) else model(*batch), "loss", None)
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
    """Every floating parameter takes a gradient; flags and gradients are put back at the end."""
    floating = [p for p in parameters.values() if p.is_floating_point()]
    before = [(p, p.requires_grad, p.grad) for p in floating]
    try:
        for p in floating:
            p.requires_grad_(True)
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


def _add_gradients(
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    wanted: set[str],
    axes: Sequence[str],
    tally: Tally,
    items: int,
) -> None:
    """Add what one backward pass left on the parameters; items: how many the loss is the mean over."""
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
    """Hooks that see what each linear layer reads."""
    handles = []
    modules = linear_modules(model, layout)
    for param, linear in layout.linears.items():
        readers = [axis for axis in axes if layout.reads(param, axis)] if "unit_act" in wanted else []
        if "act_sq" not in wanted and not readers:
            continue
        inputs = layout.shape(param)[linear.in_dim]
        for path, module in modules.get(param, {}).items():
            hook = _input_hook(param, path, inputs, layout, readers, "act_sq" in wanted, tally, token_mask)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(
    param: str,
    path: str,
    inputs: int,
    layout: Layout,
    readers: Sequence[str],
    squares: bool,
    tally: Tally,
    token_mask: TokenMask,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    in_dim = layout.linears[param].in_dim

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = real_rows(path, input_of(module, args, kwargs), inputs, token_mask)
        if rows is None:
            return
        if squares:
            tally.add("act_sq", param, rows.square().sum(0), rows.shape[0])
        if readers:
            magnitude = to_numpy(rows.abs().sum(0))
            for axis in readers:
                owner = layout.owners(param, axis)[in_dim]
                assert owner is not None
                tally.add("unit_act", axis, sum_by_owner(owner, magnitude, layout.axis(axis).size), rows.shape[0])

    return look
