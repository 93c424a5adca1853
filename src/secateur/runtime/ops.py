"""The kernels as torch operators, `secateur::sparse_linear` and `secateur::attention`, opaque to torch.compile and
torch.export.

Inference only: the operators have no backward.
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


_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v for q (batch, heads, queries, width) and k, v (batch, kv heads, keys, width), all
    float32; mask, in four dimensions that broadcast, is added or (bool) says which keys are seen. Returns (batch,
    queries, heads, width).
    """
    native = load_native()
    if native is None:
        raise RuntimeError("attention needs the compiled kernels; use torch's own")
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if any(t.dtype != torch.float32 for t in (q, k, v)):
        raise TypeError("attention takes float32")
    if k.shape != (batch, kv_heads, keys, width) or v.shape != k.shape or not kv_heads or heads % kv_heads:
        raise ValueError(f"attention of {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} does not fit")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty((batch, queries, heads, width))
    added = kept = 0
    mask_stride = (0, 0, 0)
    if mask is not None:
        if mask.dtype not in (torch.float32, torch.bool):
            raise TypeError(f"the mask is float32 or bool, not {mask.dtype}")
        mask = mask.expand(batch, heads, queries, keys)
        if mask.stride(3) != 1:
            mask = mask[:1, :1].contiguous() if mask.stride()[:2] == (0, 0) else mask.contiguous()
            mask = mask.expand(batch, heads, queries, keys)
        mask_stride = mask.stride()[:3]
        added, kept = (0, mask.data_ptr()) if mask.dtype == torch.bool else (mask.data_ptr(), 0)
    native.attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        (queries * heads * width, width, heads * width),
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        width,
        added,
        mask_stride,
        kept,
        mask_stride,
        scale,
        torch.get_num_threads(),
        0,
    )
    return out


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


_library.impl("attention", _attention, "CPU")
torch.library.register_fake("secateur::attention", _fake_attention, lib=_library)
_library.impl("sparse_linear", _sparse_linear, "CPU")
torch.library.register_fake("secateur::sparse_linear", _fake, lib=_library)
if load_native() is not None:
    share_openmp()

attention = torch.ops.secateur.attention.default
sparse_linear = torch.ops.secateur.sparse_linear.default
