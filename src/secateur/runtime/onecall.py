"""Modules that are a linear layer, a sum and a norm, and nothing else, run as one call of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch
from torch import nn

from secateur.runtime.linear import ByTokens, SparseLinear
from secateur.runtime.ops import sparse_linear_after
from secateur.runtime.packed import NORMS


@dataclass(frozen=True)
class OneCall:
    """How a module is norm(linear(x) + residual).

    `linear`, `scale` and `shift` are paths inside the module ('' where the norm has none), `names` the parameters of
    its forward, `x` and `residual` those that the layer reads and that is added to its output (None: nothing is).
    """

    linear: str
    names: tuple[str, ...]
    x: str
    residual: str | None = None
    norm: str = "none"
    scale: str = ""
    shift: str = ""
    epsilon: float = 0.0


class _InOneCall:
    """Comes before the class of a module whose children stay as they are; what it does not know runs there."""

    one_call: OneCall

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        one = self.one_call
        given = {**dict(zip(one.names, args, strict=False)), **kwargs}
        x = given.get(one.x)
        residual = None if one.residual is None else given.get(one.residual)
        layer = _inner(self, one.linear)
        if isinstance(layer, ByTokens) and isinstance(x, torch.Tensor):
            layer = layer.form(x)
        scale, shift = _inner(self, one.scale), _inner(self, one.shift)
        known = {one.x, one.residual} - {None}
        if (
            not isinstance(layer, SparseLinear)
            or len(args) + len(kwargs) != len(known)
            or not _fit(layer, x, residual, one.residual is not None)
            or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, scale, shift)))
            or self.training  # type: ignore[attr-defined]
            or _watched(self)
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return sparse_linear_after(
            x,
            layer.packed,
            layer.bias,
            layer.out_features,
            layer.activation_code,
            residual,
            NORMS.index(one.norm),
            scale,
            shift,
            one.epsilon,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = type(self).__mro__[2]
        return _blank, (plain,), self.__dict__


@cache
def _in_one_call(plain: Any) -> Any:
    return type(f"OneCall{plain.__name__}", (_InOneCall, plain), {})


def _blank(plain: Any) -> Any:
    """For copy and pickle, which find no class that was made here by its name."""
    return object.__new__(_in_one_call(plain))


def use_one_call(module: nn.Module, one: OneCall) -> None:
    """Let a module run as one call from now on, wherever it can: not in training, with hooks on its children, in other
    types than float32, or with other arguments than `one` knows.

    Raises:
        ValueError: when the module does not hold what `one` names.
    """
    if one.norm not in NORMS:
        raise ValueError(f"unknown norm {one.norm!r}: use one of {', '.join(NORMS)}")
    for path in filter(None, (one.linear, one.scale, one.shift)):
        try:
            _inner(module, path)
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no {path!r}") from None
    plain: Any = type(module)
    module.__class__ = _in_one_call(plain)
    module.one_call = one


def one_calls(model: nn.Module) -> dict[str, OneCall]:
    """The modules that run as one call, by path."""
    return {name: module.one_call for name, module in model.named_modules() if isinstance(module, _InOneCall)}


def _inner(module: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), module) if path else None


def _fit(layer: SparseLinear, x: Any, residual: Any, added: bool) -> bool:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return False
    if not added:
        return True
    if not isinstance(residual, torch.Tensor) or residual.dtype != torch.float32:
        return False
    return residual.shape == (*x.shape[:-1], layer.out_features)


def _watched(module: nn.Module) -> bool:
    """Whether something inside has hooks; asked at each call, for hooks and children may be new. A loop, which takes a
    third of the time of a generator.
    """
    for child in module._modules.values():
        if child is not None and (
            child._forward_hooks or child._forward_pre_hooks or (child._modules and _watched(child))
        ):
            return True
    return False
