"""What linear layers read: the modules that multiply by a weight, their inputs, and hooks that see them."""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.torch.base.batches import evaluating, run, size_of
from secateur.torch.stats.padding import TokenMask

InputHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""(module, positional arguments, keyword arguments) of a call."""


def linear_modules(model: nn.Module, layout: Layout) -> dict[str, dict[str, nn.Module]]:
    """Linear weight -> the modules that multiply by it, by path; several where the weight is tied."""
    modules = dict(model.named_modules())
    by_weight: dict[str, dict[str, nn.Module]] = {param: {} for param in layout.linears}
    for name in (*layout.linears, *layout.tied):
        param = layout.tied.get(name, name)
        path, _, leaf = name.rpartition(".")
        if param in by_weight and leaf == "weight" and path in modules:
            by_weight[param][path] = modules[path]
    return by_weight


@contextlib.contextmanager
def before_calls(hooks: Iterable[tuple[nn.Module, InputHook]]) -> Iterator[None]:
    """While the context lasts, each hook runs before every call of its module."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a linear module reads in a call: the first argument, by position or by the name of its parameter."""
    if args:
        return args[0]
    return kwargs[next(iter(inspect.signature(module.forward).parameters))]


def rows_read(model: nn.Module, batch: Any) -> int:
    """How many rows most linear layers read in a call on a batch: tokens, patches or frames of all its examples."""
    counts: Counter[int] = Counter()

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(module, args, kwargs)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1:
            counts[x.numel() // x.shape[-1]] += 1

    linear = [m for m in model.modules() if isinstance(w := getattr(m, "weight", None), torch.Tensor) and w.dim() == 2]
    with evaluating(model), torch.no_grad(), before_calls([(module, see) for module in linear]):
        run(model, batch)
    return max(1, counts.most_common(1)[0][0] if counts else size_of(batch))


def real_rows(path: str, x: torch.Tensor, inputs: int | None, token_mask: TokenMask) -> torch.Tensor | None:
    """What a linear module at `path` read of real tokens, float32 of shape (tokens, in).

    None where it read indices, as an embedding does that shares its weight with a linear layer. Raises ModelError when
    a token does not have `inputs` values.
    """
    x = x.detach()
    if not x.is_floating_point():
        return None
    if inputs is not None and x.shape[-1] != inputs:
        raise ModelError(f"{path} reads {x.shape[-1]} values where the layout says {inputs}")
    mask = token_mask(path, tuple(x.shape[:-1]))
    return (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).float()
