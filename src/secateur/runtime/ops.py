"""The kernels as one torch operator, `secateur::sparse_linear`, opaque to torch.compile and torch.export.

Inference only: the operator has no backward.
"""

from __future__ import annotations

import torch

from secateur.runtime.native import load_native, share_openmp
from secateur.runtime.packed import ACTIVATIONS

_library = torch.library.Library("secateur", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int activation) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _sparse_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise TypeError(f"sparse_linear takes float32 activations, not {x.dtype}; cast them or leave the layer dense")
    native = load_native()
    if native is None:
        return _without_kernels(x, packed, bias, activation)
    cols = x.shape[-1]
    if x.dim() != 2:
        x2 = x.reshape(-1, cols)
    else:
        x2 = x
    if x2.stride(1) != 1 or x2.stride(0) < cols:
        x2 = x2.contiguous()
    y = x2.new_empty((*x.shape[:-1], out_features))
    tokens = x2.shape[0]
    # The header of `packed` is checked inside; what it says must fit what the tensors can hold.
    _, _, rows, packed_cols, *_ = native.describe(packed.data_ptr(), packed.numel())
    if packed_cols != cols or rows != out_features:
        raise ValueError(
            f"the packed weight is ({rows}, {packed_cols}), but the input has {cols} features and "
            f"{out_features} "
            "outputs were asked for"
        )
    native.linear(
        packed.data_ptr(),
        packed.numel(),
        x2.data_ptr(),
        tokens,
        x2.stride(0) if tokens > 1 else cols,
        0 if bias is None else bias.data_ptr(),
        activation,
        y.data_ptr(),
        out_features,
        torch.get_num_threads(),
        0,
    )
    return y


def _without_kernels(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: int) -> torch.Tensor:
    from secateur.runtime import reference

    y = torch.nn.functional.linear(x, torch.from_numpy(reference.unpack(packed.numpy())), bias)
    name = ACTIVATIONS[activation]
    if name == "none":
        return y
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    return getattr(torch.nn.functional, name)(y)


def _fake(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("sparse_linear", _sparse_linear, "CPU")
torch.library.register_fake("secateur::sparse_linear", _fake, lib=_library)
if load_native() is not None:
    share_openmp()

sparse_linear = torch.ops.secateur.sparse_linear.default
