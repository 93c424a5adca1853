"""The modules that replace a sparse nn.Linear (or transformers Conv1D). Their weight is packed, once or for each size
of call; they have no backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.kernels.format import ACTIVATIONS, describe
from secateur.kernels.packing import unpack
from secateur.runtime.layers.operators import run, sparse_linear
from secateur.runtime.layers.packed import checked_packed, checked_vector


class SparseLinear(nn.Module):
    """y = activation(x @ weight.T + bias) with x (..., in_features), on the sparse kernels.

    `packed` is always a weight that was validated: it is when the layer is made, when it is exchanged, and when a state
    is loaded. So no call has to look at it.

    Args:
        packed: the packed weight, a flat uint8 tensor from `secateur.kernels.packing.pack`.
        bias: (out_features,) float32, or None.
        activation: one of 'none', 'relu', 'gelu', 'gelu_tanh', 'silu'; applied while the outputs are in cache.

    Raises:
        ValueError: when `packed` is not a packed weight, or is damaged, or the bias does not fit.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, packed: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"):
        super().__init__()
        packed = checked_packed(packed)
        info = describe(packed.numpy())
        bias = checked_vector(bias, info.rows, "bias")
        self.in_features, self.out_features = info.cols, info.rows
        self.activate(activation)
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name in ("packed", "bias")
            and name in self.__dict__.get("_buffers", ())
            and value is not getattr(self, name)
        ):
            value = self._checked(name, value)
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        """A new packed weight or bias; tensors of tracers, which have no memory, pass."""
        if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter):
            return value
        if name == "bias":
            vector = checked_vector(value, self.out_features, "bias")
            return None if vector is None else vector.detach()
        return checked_packed(value, (self.out_features, self.in_features)).detach()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        *_, errors = rest
        for name in ("packed", "bias"):
            value = state_dict.get(prefix + name)
            if value is None or value is getattr(self, name):
                continue
            try:
                self._checked(name, value)
            except ValueError as error:
                errors.append(f"{prefix}{name}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def activate(self, activation: str) -> None:
        """Apply one of `ACTIVATIONS` to the outputs from now on.

        Raises:
            ValueError: for an unknown activation.
        """
        self.activation_code = ACTIVATIONS.index(activation)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x (..., in_features), float32.

        Raises:
            RuntimeError: when a gradient would be needed: packed layers cannot be trained.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a packed layer has no backward: run under torch.inference_mode() or torch.no_grad(), or train the "
                "uncompiled model"
            )
        return run(sparse_linear, x, self.packed, self.bias, self.out_features, self.activation_code)

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder on the meta device with the dense weight's shape and type, for code that only reads those."""
        return torch.empty((self.out_features, self.in_features), device="meta")

    def dense_weight(self) -> torch.Tensor:
        """The weight (out_features, in_features); each call unpacks it again."""
        return torch.from_numpy(np.asarray(unpack(self.packed.numpy())))

    def _apply(self, fn, recurse=True):
        # `fn` is tried on empty tensors first, so that a refused move or cast leaves the layer unchanged.
        packed, bias = fn(torch.empty(0, dtype=torch.uint8)), fn(torch.empty(0))
        if packed.dtype != torch.uint8 or packed.device.type != "cpu":
            raise TypeError("a packed layer stays on the CPU; move the model before compiling it")
        if bias.dtype != torch.float32:
            raise TypeError(f"a packed layer computes in float32, not {bias.dtype}; compile a float32 model")
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        info = describe(self.packed.numpy())
        density = info.nonzeros / (info.rows * info.cols)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}, {info.format} {info.value}, "
            f"{density:.0%} kept"
        )


class ByTokens(nn.Module):
    """One linear layer in several variants, each for calls of about so many tokens: a decoder's prompt, and its steps.

    Args:
        layers: modules that compute the same: SparseLinear, or the dense layer.
        tokens: for each, the number of tokens (rows of x) that it is best at, rising. Between two numbers, the variant
            of the nearer number by ratio is taken.
    """

    def __init__(self, layers: Sequence[nn.Module], tokens: Sequence[int]):
        super().__init__()
        self.layers, self.tokens = nn.ModuleList(layers), tuple(tokens)
        self._limits = [math.sqrt(a * b) for a, b in zip(self.tokens, self.tokens[1:], strict=False)]
        self.out_features, self.in_features = layer_shape(layers[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x (..., in_features), float32."""
        return self.layer_for(x)(x)

    def layer_for(self, x: torch.Tensor) -> nn.Module:
        """The variant that is best for x (..., in_features)."""
        return self.layer_for_tokens(x.numel() // self.in_features)

    def layer_for_tokens(self, tokens: int) -> nn.Module:
        """The variant that is best for so many tokens.

        A decoder asks this for each layer of each token, and looking a variant up through nn.Module and nn.ModuleList
        takes several microseconds, as long as a small layer. So their tables are read directly.
        """
        number = 0
        for limit in self._limits:
            if tokens > limit:
                number += 1
        variants: Any = self._modules["layers"]
        return variants._modules[str(number)]

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder on the meta device with the dense weight's shape and type, for code that only reads those."""
        return torch.empty((self.out_features, self.in_features), device="meta")

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"tokens={', '.join(map(str, self.tokens))}"


def layer_shape(layer: nn.Module) -> tuple[Any, Any]:
    """(out, in) of a linear layer or a transformers Conv1D; None for what the module does not say."""
    return (
        getattr(layer, "out_features", getattr(layer, "nf", None)),
        getattr(layer, "in_features", getattr(layer, "nx", None)),
    )
