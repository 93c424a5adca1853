"""Modules that are no more than a linear layer, a sum and a norm, or a gated pair of layers, or a norm that is written
out, run as one or two calls of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, reduce
from typing import Any

import torch
from torch import nn

from secateur.kernels.packing import ACTIVATIONS, NORMS
from secateur.runtime.layers.hooks import is_watched
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from secateur.runtime.layers.operators import norm as norm_operator
from secateur.runtime.layers.operators import run, sparse_linear, sparse_linear_after


@dataclass(frozen=True)
class LinearAddNorm:
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

    def inside(self) -> tuple[str, ...]:
        """Paths of what the module has to hold."""
        return self.linear, self.scale, self.shift

    def inputs(self) -> tuple[str, ...]:
        """The arguments that the module is called with, no others."""
        return (self.x,) if self.residual in (None, self.x) else (self.x, str(self.residual))

    def compute(self, module: nn.Module, x: Any, residual: Any = None) -> torch.Tensor | None:
        """What the module gives for these inputs, or None where the kernels do not know how."""
        residual = x if self.residual == self.x else residual
        layer, scale, shift = _form(module, self.linear, x), _inner(module, self.scale), _inner(module, self.shift)
        if layer is None or not _known(x, scale, shift):
            return None
        if self.residual is not None and not (
            _known(residual) and residual.shape == (*x.shape[:-1], layer.out_features)
        ):
            return None
        return run(
            sparse_linear_after,
            x,
            layer.packed,
            layer.bias,
            layer.out_features,
            layer.activation_code,
            None,
            residual,
            NORMS.index(self.norm),
            scale,
            shift,
            self.epsilon,
        )


@dataclass(frozen=True)
class Gated:
    """How a module is down(activation(gate(x)) * up(x)), or ends with the product (`down` is '').

    `gate`, `up` and `down` are paths inside the module, `names` the parameters of its forward, `x` the one that is
    read. The module of the activation may have gone: `activation` says what it is.
    """

    gate: str
    up: str
    down: str
    activation: str
    names: tuple[str, ...]
    x: str

    def inside(self) -> tuple[str, ...]:
        """Paths of what the module has to hold."""
        return self.gate, self.up, self.down

    def inputs(self) -> tuple[str, ...]:
        """The arguments that the module is called with, no others."""
        return (self.x,)

    def compute(self, module: nn.Module, x: Any) -> torch.Tensor | None:
        """What the module gives for this input, or None where the kernels do not know how."""
        gate, up = _form(module, self.gate, x), _form(module, self.up, x)
        if gate is None or up is None or not _known(x):
            return None
        code = ACTIVATIONS.index(self.activation)
        opened = run(sparse_linear, x, gate.packed, gate.bias, gate.out_features, code)
        product = run(
            sparse_linear_after,
            x,
            up.packed,
            up.bias,
            up.out_features,
            up.activation_code,
            opened,
            None,
            0,
            None,
            None,
            0.0,
        )
        return _inner(module, self.down)(product) if self.down else product


@dataclass(frozen=True)
class PrimitiveNorm:
    """How a module is a norm over the last dimension, written out in its forward: see LinearAddNorm."""

    norm: str
    names: tuple[str, ...]
    x: str
    scale: str = ""
    epsilon: float = 0.0

    def inside(self) -> tuple[str, ...]:
        """Paths of what the module has to hold."""
        return (self.scale,)

    def inputs(self) -> tuple[str, ...]:
        """The arguments that the module is called with, no others."""
        return (self.x,)

    def compute(self, module: nn.Module, x: Any) -> torch.Tensor | None:
        """What the module gives for this input, or None where the kernels do not know how."""
        scale = _inner(module, self.scale)
        if not _known(x, scale):
            return None
        return run(norm_operator, x, NORMS.index(self.norm), scale, None, self.epsilon)


One = LinearAddNorm | Gated | PrimitiveNorm
KINDS: Mapping[str, type[One]] = {"linear": LinearAddNorm, "gated": Gated, "norm": PrimitiveNorm}


class _FusedForward:
    """Comes before the class of a module whose children stay as they are; what it does not know runs there."""

    one_call: One

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        one = self.one_call
        inputs = self._inputs(one, args, kwargs)
        if inputs is not None and not self.training and not _watched(self):  # type: ignore[attr-defined]
            output = one.compute(self, *inputs)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _inputs(one: One, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What `one` computes from, where the module is called with that and nothing else."""
        inputs = one.inputs()
        if not kwargs and args and len(args) == len(inputs) and one.names[: len(args)] == inputs:
            return args
        given = {**dict(zip(one.names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(inputs) or any(name not in given for name in inputs):
            return None
        return tuple(given[name] for name in inputs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = type(self).__mro__[2]
        return _blank, (plain,), self.__dict__


@cache
def _in_one_call(plain: Any) -> Any:
    return type(f"LinearAddNorm{plain.__name__}", (_FusedForward, plain), {})


def _blank(plain: Any) -> Any:
    """For copy and pickle, which find no class that was made here by its name."""
    return object.__new__(_in_one_call(plain))


def use_one_call(module: nn.Module, one: One) -> None:
    """Let a module run as one call from now on, wherever it can: not in training, with hooks on its children, in other
    types than float32, or with other arguments than `one` knows.

    Raises:
        ValueError: when the module does not hold what `one` names.
    """
    for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
        if getattr(one, name, known[0]) not in known:
            raise ValueError(f"unknown {name} {getattr(one, name)!r}: use one of {', '.join(known)}")
    for path in filter(None, one.inside()):
        try:
            _inner(module, path)
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no {path!r}") from None
    plain: Any = type(module)
    module.__class__ = _in_one_call(plain)
    module.one_call = one


def one_calls(model: nn.Module) -> dict[str, One]:
    """The modules that run as one call, by path."""
    return {name: module.one_call for name, module in model.named_modules() if isinstance(module, _FusedForward)}


def to_json(one: One) -> dict[str, Any]:
    """For a manifest."""
    return {"kind": next(kind for kind, cls in KINDS.items() if type(one) is cls), **asdict(one)}


def from_json(data: Mapping[str, Any]) -> One:
    """What `to_json` made, or an older one without a kind.

    Raises:
        TypeError, KeyError: when it is none.
    """
    fields = {**data, "names": tuple(data["names"])}
    return KINDS[fields.pop("kind", "linear")](**fields)


def _inner(module: Any, path: str) -> Any:
    if not path:
        return None
    return reduce(getattr, path.split("."), module) if "." in path else getattr(module, path)


def _form(module: nn.Module, path: str, x: Any) -> SparseLinear | None:
    """The packed layer at a path, in the form for x."""
    layer = _inner(module, path)
    if isinstance(layer, ByTokens) and isinstance(x, torch.Tensor):
        layer = layer.form(x)
    return layer if isinstance(layer, SparseLinear) else None


def _known(x: Any, *others: torch.Tensor | None) -> bool:
    """Whether x is float32, and neither it nor the others need a gradient."""
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.float32:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *others))


def _watched(module: nn.Module) -> bool:
    """Whether something inside has hooks; asked at each call, for hooks and children may be new. A loop, which takes a
    third of the time of a generator.
    """
    for child in module._modules.values():
        if child is None:
            continue
        if (child._forward_hooks or child._forward_pre_hooks) and is_watched(child):
            return True
        if child._modules and _watched(child):
            return True
    return False
