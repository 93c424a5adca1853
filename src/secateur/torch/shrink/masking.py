"""Masks for units that have no weights to set to zero: layers are bypassed, and routers never choose removed experts.

A bypassed layer returns the residual stream that it was given. A masked expert has a router logit of minus infinity, so
that each token goes to the best of the remaining experts, exactly as after removal.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.torch.tokens.install import passing_by


@contextlib.contextmanager
def bypassed(model: nn.Module, layout: Layout, plan: Plan) -> Iterator[None]:
    """A context in which the layers and experts that the plan removes take no part in the forward pass."""
    with contextlib.ExitStack() as stack:
        layers = list(removed_layers(layout, plan))
        stack.enter_context(passing_by(model, layers))
        for path, index in layers:
            stack.enter_context(bypassed_module(model.get_submodule(f"{path}.{index}")))
        routers = _routers(model, layout, plan)
        if routers:
            stack.enter_context(_Routing(routers))
        yield


def removed_layers(layout: Layout, plan: Plan) -> Iterator[tuple[str, int]]:
    """Module list and index of every layer that the plan removes."""
    for name, units in plan.keep.items():
        axis = layout.axis(name)
        if axis.kind == "layer" and axis.path:
            for index in sorted(set(range(axis.size)) - {int(u) for u in units}):
                yield axis.path, index


@contextlib.contextmanager
def bypassed_module(module: nn.Module) -> Iterator[None]:
    """A context in which the module returns its input stream, in the form of its output (tensor, tuple or mapping)."""

    def bypass(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stream = first_of(output)
        if stream is None:
            raise ModelError(f"{type(module).__name__} returns no tensor; the layer cannot be bypassed, only removed")
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        entered = next((t for t in inputs if t.shape == stream.shape and t.dtype == stream.dtype), None)
        if entered is None:
            raise ModelError(
                f"{type(module).__name__} is given no tensor of the shape {tuple(stream.shape)} that it returns; "
                "leaving the layer out would change the stream, so keep it"
            )
        return _replaced(output, entered)

    # before the hooks of a schedule of tokens, which work on the stream as it leaves the block
    handle = module.register_forward_hook(bypass, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def first_of(output: Any) -> torch.Tensor | None:
    """The first tensor of a module's output, or None."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _replaced(output: Any, entered: torch.Tensor) -> Any:
    """The output with its first tensor replaced by `entered`."""
    if isinstance(output, torch.Tensor):
        return entered
    first = first_of(output)
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if value is first)
        output[key] = entered  # type: ignore[index]
        return output
    return type(output)([entered if value is first else value for value in output])


# -- experts ------------------------------------------------------------------------------------------------------


def _routers(model: nn.Module, layout: Layout, plan: Plan) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
    """Router weights of the expert axes that lose units: id -> (name, weight, which of its outputs are removed)."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    routers = {}
    for axis, units in plan.keep.items():
        if layout.axis(axis).kind != "expert" or len(units) == layout.axis(axis).size:
            continue
        names = [n for n, d in layout.params.items() if len(d) == 2 and d[0] == ((axis,),) and n in tensors]
        if not names:
            raise ModelError(f"no router weight has one row for each of {axis}; its experts cannot be masked")
        removed = torch.ones(layout.axis(axis).size, dtype=torch.bool)
        removed[torch.as_tensor(units, dtype=torch.long)] = False
        for name in names:
            routers[id(tensors[name])] = (name, tensors[name], removed.to(tensors[name].device))
    return routers


class _Routing(TorchFunctionMode):
    """A mode in which each linear map by a router weight returns minus infinity as the logits of removed experts."""

    def __init__(self, routers: Mapping[int, tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.routers = routers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            if id(weight) in self.routers:
                return result.masked_fill(self.routers[id(weight)][2], float("-inf"))
        return result
