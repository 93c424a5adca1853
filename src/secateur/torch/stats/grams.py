"""Grams of what linear layers read, summed while a model or a part of it runs."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.stats import Tally
from secateur.torch.stats.padding import TokenMask, no_padding


def linear_modules(model: nn.Module, layout: Layout) -> dict[str, dict[str, nn.Module]]:
    """Linear weight -> the modules that multiply by it, by path; several where the weight is tied."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, nn.Module]] = {param: {} for param in layout.linears}
    for name in (*layout.linears, *layout.tied):
        param = layout.tied.get(name, name)
        path, _, leaf = name.rpartition(".")
        if param in found and leaf == "weight" and path in modules:
            found[param][path] = modules[path]
    return found


@contextlib.contextmanager
def watch_grams(
    modules: Mapping[str, Mapping[str, nn.Module]],
    readers: Mapping[str, str],
    tally: Tally,
    token_mask: TokenMask = no_padding,
) -> Iterator[None]:
    """While the context lasts, every forward pass adds "gram" to `tally`: the sum of x x^T over tokens, in float32.

    modules: linear weight -> its modules by path (see `linear_modules`), whole models or one block alike.
    readers: linear weight -> the weight whose gram it shares (see `Layout.readers`); only that one is watched, so the
    gram of a weight is `tally.stats().mean("gram", readers[weight])`.
    token_mask: which tokens are real.
    A weight of more than two dimensions has one matrix for each expert or group, so no one gram is its own.
    """
    handles = []
    for param in dict.fromkeys(readers.values()):
        for path, module in modules.get(param, {}).items():
            if module.weight.dim() != 2:
                continue
            hook = _gram_hook(param, path, tally, token_mask)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a linear module reads in a call, given by position or by the name of its first parameter."""
    if args:
        return args[0]
    return kwargs[next(iter(inspect.signature(module.forward).parameters))]


def real_rows(path: str, x: torch.Tensor, inputs: int | None, token_mask: TokenMask) -> torch.Tensor | None:
    """What a linear module at `path` read of real tokens, float32 of shape (tokens, in); None where it read indices
    (an embedding that shares its weight with a linear layer). ModelError when there are not `inputs` values a token.
    """
    x = x.detach()
    if not x.is_floating_point():
        return None
    if inputs is not None and x.shape[-1] != inputs:
        raise ModelError(f"{path} reads {x.shape[-1]} values where the layout says {inputs}")
    mask = token_mask(path, tuple(x.shape[:-1]))
    return (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).float()


def _gram_hook(
    param: str, path: str, tally: Tally, token_mask: TokenMask
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = real_rows(path, input_of(module, args, kwargs), None, token_mask)
        if rows is not None:
            tally.add("gram", param, rows.T @ rows, rows.shape[0])

    return look
