"""One block of a model: its grams from calls, its linear weights pruned by a method of `secateur.repair`."""

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
from secateur.select import NM
from secateur.stats import Tally
from secateur.torch.stats.grams import watch_grams

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Pruned:
    """One weight after pruning. error: |W x - W' x|^2 over |W x|^2 on the calibration tokens; None without any."""

    name: str
    weights: int
    zeros: int
    error: float | None
    notes: tuple[str, ...] = ()


def counted(layout: Layout, model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The weights of a block that are pruned, with the modules that hold them: linear weights of two dimensions."""
    found = {}
    modules = dict(model.named_modules())
    for name in default_weights(layout):
        owner, _, leaf = name.rpartition(".")
        if name.startswith(f"{path}.") and leaf == "weight" and owner in modules and len(layout.shape(name)) == 2:
            found[name] = modules[owner]
    return found


def left_out(layout: Layout, model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Linear weights of the layers that are not pruned here, for they are stacked (experts) or belong to no module."""
    taken = {name for path in paths for name in counted(layout, model, path)}
    return [name for name in default_weights(layout) if name not in taken]


@torch.no_grad()
def grams_of(
    block: nn.Module, weights: Mapping[str, nn.Module], layout: Layout, calls: Iterable[Call]
) -> dict[str, torch.Tensor]:
    """Gram (in, in) of each weight, the same tensor for weights that read the same; the calls run through the block."""
    readers = layout.readers(list(weights))
    tally = Tally()
    modules = {name: {name: module} for name, module in weights.items()}
    with watch_grams(modules, readers, tally):
        for args, kwargs in calls:
            block(*args, **kwargs)
    stats = tally.stats()
    means = {first: torch.as_tensor(stats.mean("gram", first)) for first in dict.fromkeys(readers.values())}
    return {name: means[first] for name, first in readers.items()}


@torch.no_grad()
def prune_weights(
    weights: Mapping[str, nn.Module],
    layout: Layout,
    grams: Mapping[str, torch.Tensor],
    method: Callable[..., Any],
    pattern: Any,
    sparsity: Callable[[str], float | None],
    options: Mapping[str, Any],
    stored: Callable[[str], torch.dtype],
) -> list[Pruned]:
    """Prune each weight in place. sparsity: of a weight; stored: the type its file has, to which it is rounded."""
    for name, module in weights.items():
        if not torch.isfinite(module.weight).all():
            raise ModelError(f"{name} holds NaN or infinity; mend the model before pruning it")
    prepared = {id(gram): _prepared(name, gram) for name, gram in grams.items()}
    done = []
    for name, module in weights.items():
        turned = layout.linears[name].in_dim == 0
        held = module.weight.detach()
        weight = held.T.contiguous() if turned else held
        gram = grams.get(name)
        given = prepared[id(gram)] if gram is not None else prepare(torch.eye(weight.shape[1]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                new = method(weight, given, pattern, sparsity(name), **options)
            except PlanError as wrong:
                raise PlanError(f"{name}: {wrong}") from None
        new = new.to(stored(name)).to(held.dtype)
        error = None
        if gram is not None:
            whole = _loss(weight, gram)
            error = max(_loss(weight - new, gram), 0.0) / whole if whole > 0 else 0.0
        held.copy_(new.T if turned else new)
        zeros = int((new == 0).sum())
        check_pattern(name, new, pattern)
        done.append(Pruned(name, new.numel(), zeros, error, tuple(dict.fromkeys(str(w.message) for w in caught))))
    return done


def _prepared(name: str, gram: torch.Tensor) -> Gram:
    try:
        return prepare(gram)
    except DataError as wrong:
        raise DataError(f"{name}: {wrong}") from None


def _loss(change: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean over tokens of |change x|^2, in the type of the gram: see `secateur.repair.layer_loss`."""
    return float(((change @ gram) * change).sum(dtype=torch.float64))


def check_pattern(name: str, weight: torch.Tensor, pattern: Any) -> None:
    """PlanError unless every group of an N:M pattern keeps no more than it may; weight (out, in)."""
    if isinstance(pattern, NM):
        kept = (weight != 0).reshape(weight.shape[0], -1, pattern.of).sum(-1)
        if int(kept.max()) > pattern.keep:
            raise PlanError(f"{name} keeps {int(kept.max())} of {pattern.of} somewhere, where {pattern} was asked")
