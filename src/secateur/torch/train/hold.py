"""hold: zeros stay zero while a model trains, whatever the optimizer does.

Gradients of removed weights are set to zero as they accumulate, so that they enter neither momentum nor gradient
clipping. After each optimizer step the weights are set to zero, so that neither weight decay nor the state of an
optimizer changes them. This works in any loop that calls `optimizer.step()`; for transformers' Trainer there is a
callback.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Width in bytes -> integer type."""


@contextlib.contextmanager
def hold(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Keep the weights where a mask is False at exactly zero until the context ends.

    parameters: by name.
    masks: bool tensors by the names of parameters, of their shapes, True where a weight is kept.
    """
    removed: dict[int, torch.Tensor] = {}
    handles: list[Any] = []

    def clear_after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in removed:
                    _clear(parameter, removed)

    try:
        for name, mask in masks.items():
            parameter = parameters[name]
            removed[id(parameter)] = ~mask.to(parameter.device)
            _clear(parameter, removed)
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(_gradient_cleaner(removed)))
        handles.append(register_optimizer_step_post_hook(clear_after_step))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in masks:
            if id(parameters[name]) in removed:
                _clear(parameters[name], removed)


def _clear(parameter: nn.Parameter, removed: dict[int, torch.Tensor]) -> None:
    with torch.no_grad():
        zero(parameter, _on_device(parameter, removed))


def zero(tensor: torch.Tensor, gone: torch.Tensor) -> None:
    """Set a floating-point tensor to +0 where the bool tensor `gone` is True, in place, infinity and NaN too.

    The result is that of `masked_fill_`, which visits a tensor element by element: a processor cannot predict the
    branches where zeros are scattered.
    """
    bits = _BITS[tensor.element_size()]
    tensor.view(bits).bitwise_and_(gone.to(bits).sub_(1))


def _on_device(parameter: torch.Tensor, removed: dict[int, torch.Tensor]) -> torch.Tensor:
    """The removed positions on the parameter's device, which may change during the hold."""
    gone = removed[id(parameter)]
    if gone.device != parameter.device:
        gone = removed[id(parameter)] = gone.to(parameter.device)
    return gone


def _gradient_cleaner(removed: dict[int, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def clean(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            zero(parameter.grad, _on_device(parameter, removed))

    return clean
