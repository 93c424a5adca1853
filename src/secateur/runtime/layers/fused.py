"""Modules that run as one or two calls of the kernels: a linear layer with a sum and a norm, a gated pair of linear
layers, and a norm that is written in single operations of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn

from secateur.kernels.format import ACTIVATIONS, NO_NORM, NORMS
from secateur.runtime.layers.hooks import is_watched_inside
from secateur.runtime.layers.linear import ByTokens, SparseLinear, layer_shape
from secateur.runtime.layers.operators import norm as norm_operator
from secateur.runtime.layers.operators import run, sparse_linear, sparse_linear_after
from secateur.runtime.layers.packed import checked_vector
from secateur.runtime.layers.swap_class import Swapped, swap_class


@dataclass(frozen=True)
class LinearAddNorm:
    """A module that computes norm(linear(x) + residual). Field names are keys of runtime.json in saved folders.

    - `linear`: the path of the linear layer inside the module
    - `names`: the parameters of the module's forward that may be passed by position
    - `x`: the parameter that the linear layer reads
    - `residual`: the parameter that is added to the layer's output; None where nothing is added
    - `norm`: one of `NORMS`
    - `scale`, `shift`: the paths of the norm's parameters inside the module; '' where the norm has none
    - `epsilon`: what the norm adds to the variance
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
        """Paths of the layers and parameters that the module must have."""
        return self.linear, self.scale, self.shift

    def inputs(self) -> tuple[str, ...]:
        """The only arguments that the module may be called with."""
        return (self.x,) if self.residual in (None, self.x) else (self.x, str(self.residual))

    def compute(self, module: nn.Module, x: Any, residual: Any = None) -> torch.Tensor | None:
        """The output of the module, or None where the kernels cannot compute it."""
        residual = x if self.residual == self.x else residual
        layer, scale, shift = _packed(module, self.linear, x), _inner(module, self.scale), _inner(module, self.shift)
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
    """A module that computes down(activation(gate(x)) * up(x)). Field names are keys of runtime.json in saved folders.

    - `gate`, `up`: the paths of the two linear layers inside the module
    - `down`: the path of the linear layer that reads the product; '' where the module ends with the product
    - `activation`: one of `ACTIVATIONS`; the module that computed it may be gone
    - `names`: the parameters of the module's forward that may be passed by position
    - `x`: the parameter that both layers read
    """

    gate: str
    up: str
    down: str
    activation: str
    names: tuple[str, ...]
    x: str

    def inside(self) -> tuple[str, ...]:
        """Paths of the layers and parameters that the module must have."""
        return self.gate, self.up, self.down

    def inputs(self) -> tuple[str, ...]:
        """The only arguments that the module may be called with."""
        return (self.x,)

    def compute(self, module: nn.Module, x: Any) -> torch.Tensor | None:
        """The output of the module, or None where the kernels cannot compute it."""
        gate, up = _packed(module, self.gate, x), _packed(module, self.up, x)
        if gate is None or up is None or not _known(x):
            return None
        code = ACTIVATIONS.index(self.activation)
        gate_output = run(sparse_linear, x, gate.packed, gate.bias, gate.out_features, code)
        product = run(
            sparse_linear_after,
            x,
            up.packed,
            up.bias,
            up.out_features,
            up.activation_code,
            gate_output,
            None,
            NO_NORM,
            None,
            None,
            0.0,
        )
        return _inner(module, self.down)(product) if self.down else product


@dataclass(frozen=True)
class PrimitiveNorm:
    """A module that computes a norm over the last dimension in single operations of torch. Field names are keys of
    runtime.json in saved folders.

    - `norm`: one of `NORMS`
    - `names`: the parameters of the module's forward that may be passed by position
    - `x`: the parameter that is normalised
    - `scale`: the path of the norm's parameter inside the module; '' where it has none
    - `epsilon`: what the norm adds to the mean of the squares
    """

    norm: str
    names: tuple[str, ...]
    x: str
    scale: str = ""
    epsilon: float = 0.0

    def inside(self) -> tuple[str, ...]:
        """Paths of the layers and parameters that the module must have."""
        return (self.scale,)

    def inputs(self) -> tuple[str, ...]:
        """The only arguments that the module may be called with."""
        return (self.x,)

    def compute(self, module: nn.Module, x: Any) -> torch.Tensor | None:
        """The output of the module, or None where the kernels cannot compute it."""
        scale = _inner(module, self.scale)
        if not _known(x, scale):
            return None
        return run(norm_operator, x, NORMS.index(self.norm), scale, None, self.epsilon)


Fusion = LinearAddNorm | Gated | PrimitiveNorm
KINDS: Mapping[str, type[Fusion]] = {"linear": LinearAddNorm, "gated": Gated, "norm": PrimitiveNorm}


class Fused(Swapped):
    """Comes before the class of a module whose children stay as they are; unknown calls run in the plain class."""

    fusion: Fusion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the fusion, or run the plain class where the kernels cannot compute it."""
        fusion = self.fusion
        inputs = self._inputs(fusion, args, kwargs)
        if inputs is not None and not self.training and not is_watched_inside(self):  # type: ignore[attr-defined]
            output = fusion.compute(self, *inputs)
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _inputs(fusion: Fusion, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The inputs of the fusion, where the module is called with these and nothing else."""
        inputs = fusion.inputs()
        if not kwargs and args and len(args) == len(inputs) and fusion.names[: len(args)] == inputs:
            return args
        by_name = {**dict(zip(fusion.names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(inputs) or any(name not in by_name for name in inputs):
            return None
        return tuple(by_name[name] for name in inputs)


def use_fused(module: Any, fusion: Fusion) -> None:
    """Let a module run as one call from now on, wherever it can: not in training, with hooks on its children, in other
    types than float32, or with other arguments than those of the fusion.

    Raises:
        ValueError: when the module lacks a layer or parameter of the fusion, or the norm or activation is unknown.
    """
    for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
        if getattr(fusion, name, known[0]) not in known:
            raise ValueError(f"unknown {name} {getattr(fusion, name)!r}: use one of {', '.join(known)}")
    for path in filter(None, fusion.inside()):
        try:
            _inner(module, path)
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no {path!r}") from None
    swap_class(module, Fused)
    module.fusion = fusion


def check_fused(module: nn.Module, fusion: Fusion) -> None:
    """Check the layers and parameters of a fusion whose data came from a file.

    Raises:
        ValueError: when a path names something else, or sizes or types do not fit.
    """
    layers = {name: getattr(fusion, name) for name in ("linear", "gate", "up", "down") if getattr(fusion, name, "")}
    sizes: dict[str, tuple[Any, Any]] = {}
    for name, path in layers.items():
        layer = _inner(module, path)
        sizes[name] = layer_shape(layer) if isinstance(layer, nn.Module) else (None, None)
        if not all(isinstance(size, int) for size in sizes[name]):
            raise ValueError(f"{path!r} is no linear layer")
    if isinstance(fusion, Gated):
        if sizes["gate"] != sizes["up"] or ("down" in sizes and sizes["down"][1] != sizes["up"][0]):
            raise ValueError(f"the layers {', '.join(layers.values())} do not fit together")
        return
    for path in filter(None, (fusion.scale, getattr(fusion, "shift", ""))):
        vector = _inner(module, path)
        length = sizes["linear"][0] if sizes else vector.numel() if isinstance(vector, torch.Tensor) else 0
        checked_vector(vector, length, path)


def fused_modules(model: nn.Module) -> dict[str, Fusion]:
    """The modules that run as one call, by path."""
    return {name: module.fusion for name, module in model.named_modules() if isinstance(module, Fused)}


def to_json(fusion: Fusion) -> dict[str, Any]:
    """A fusion as JSON for a manifest."""
    return {"kind": next(kind for kind, cls in KINDS.items() if type(fusion) is cls), **asdict(fusion)}


def from_json(data: Mapping[str, Any]) -> Fusion:
    """Read a fusion that `to_json` has written; without a kind, as older versions wrote it, it is a LinearAddNorm.

    Raises:
        TypeError, KeyError: when the data is not a fusion.
    """
    fields = {**data, "names": tuple(data["names"])}
    return KINDS[fields.pop("kind", "linear")](**fields)


def _inner(module: Any, path: str) -> Any:
    if not path:
        return None
    return reduce(getattr, path.split("."), module) if "." in path else getattr(module, path)


def _packed(module: nn.Module, path: str, x: Any) -> SparseLinear | None:
    """The packed layer at a path, for the number of tokens in x; None where the layer is dense."""
    layer = _inner(module, path)
    if isinstance(layer, ByTokens) and isinstance(x, torch.Tensor):
        layer = layer.layer_for(x)
    return layer if isinstance(layer, SparseLinear) else None


def _known(x: Any, *parameters: torch.Tensor | None) -> bool:
    """Whether x is float32, and neither x nor the parameters need a gradient."""
    if not isinstance(x, torch.Tensor) or x.dtype is not torch.float32:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *parameters))
