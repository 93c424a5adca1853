"""One block of a model: the grams of its linear weights, and their pruning by a method of `secateur.repair`."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import DataError, ModelError, PlanError
from secateur.layout import Layout
from secateur.pruning import default_weights
from secateur.repair import Gram, prepare
from secateur.select import NM, rows_of
from secateur.stats import Tally
from secateur.torch.blockwise.block_calls import BlockCall
from secateur.torch.stats.grams import watch_grams


@dataclass(frozen=True)
class Pruned:
    """One weight after pruning.

    name: of the parameter.
    weights, zeros: how many weights it has, and how many of them are zero.
    error: |W x - W' x|^2 divided by |W x|^2 on the calibration tokens; None where there are none.
    notes: warnings of the method.
    """

    name: str
    weights: int
    zeros: int
    error: float | None
    notes: tuple[str, ...] = ()


def counted(layout: Layout, model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The weights of a block that are pruned, with their modules: linear weights of two dimensions."""
    owners = {}
    modules = dict(model.named_modules())
    for name in default_weights(layout):
        owner, _, leaf = name.rpartition(".")
        if name.startswith(f"{path}.") and leaf == "weight" and owner in modules and len(layout.shape(name)) == 2:
            owners[name] = modules[owner]
    return owners


def left_out(layout: Layout, model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Linear weights of the layers that are not pruned, as they are stacked (experts) or belong to no module."""
    taken = {name for path in paths for name in counted(layout, model, path)}
    return [name for name in default_weights(layout) if name not in taken]


@torch.no_grad()
def grams_of(
    block: nn.Module, weights: Mapping[str, nn.Module], layout: Layout, calls: Iterable[BlockCall]
) -> dict[str, torch.Tensor]:
    """Gram (in, in) of each weight over the calls of a block; weights that read the same tensor share one."""
    readers = layout.readers(list(weights))
    tally = Tally()
    modules = {name: {name: module} for name, module in weights.items()}
    with watch_grams(modules, readers, tally):
        for call in calls:
            call.run(block)
    stats = tally.stats()
    means = {first: torch.as_tensor(stats.mean("gram", first)) for first in dict.fromkeys(readers.values())}
    return {name: means[first] for name, first in readers.items()}


@torch.no_grad()
def prune_weights(
    weights: Mapping[str, nn.Module],
    layout: Layout,
    grams: Mapping[str, torch.Tensor],
    *,
    method: Callable[..., Any],
    pattern: Any,
    sparsity: Callable[[str], float | None],
    options: Mapping[str, Any],
    stored: Callable[[str], torch.dtype],
) -> list[Pruned]:
    """Prune each weight in place.

    grams: weight -> its gram; empty where no text is read.
    method, options: see `secateur.repair`.
    sparsity: weight -> its sparsity, None for N:M.
    stored: weight -> the type of its file, to which it is rounded.

    Raises ModelError for a weight that is not finite, DataError for such a gram, PlanError for a pattern that does not
    fit.
    """
    for name, module in weights.items():
        if not torch.isfinite(module.weight).all():
            raise ModelError(f"{name} holds NaN or infinity; mend the model before pruning it")
    prepared = {id(gram): _prepared(name, gram) for name, gram in grams.items()}
    done = []
    for name, module in weights.items():
        matrix = rows_of(module.weight.detach(), layout.linears[name].in_dim)  # (out, in), a view
        weight = matrix.contiguous()
        gram = grams.get(name)
        factors = prepared[id(gram)] if gram is not None else prepare(torch.eye(weight.shape[1]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                new = method(weight, factors, pattern, sparsity(name), **options)
            except PlanError as problem:
                raise PlanError(f"{name}: {problem}") from None
        new = new.to(stored(name)).to(weight.dtype)
        error = None
        if gram is not None:
            whole = _loss(weight, gram)
            error = max(_loss(weight - new, gram), 0.0) / whole if whole > 0 else 0.0
        matrix.copy_(new)
        zeros = int((new == 0).sum())
        check_pattern(name, new, pattern)
        done.append(Pruned(name, new.numel(), zeros, error, tuple(dict.fromkeys(str(w.message) for w in caught))))
    return done


def _prepared(name: str, gram: torch.Tensor) -> Gram:
    """`prepare`, with the name of the weight in its errors."""
    try:
        return prepare(gram)
    except DataError as problem:
        raise DataError(f"{name}: {problem}") from None


def _loss(change: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean over tokens of |change x|^2, in the type of the gram: see `secateur.repair.layer_loss`."""
    return float(((change @ gram) * change).sum(dtype=torch.float64))


def check_pattern(name: str, weight: torch.Tensor, pattern: Any) -> None:
    """PlanError unless every group of an N:M pattern keeps no more than it may; weight (out, in)."""
    if isinstance(pattern, NM):
        kept = (weight != 0).reshape(weight.shape[0], -1, pattern.of).sum(-1)
        if int(kept.max()) > pattern.keep:
            raise PlanError(f"{name} keeps {int(kept.max())} of {pattern.of} somewhere, where {pattern} was asked")
