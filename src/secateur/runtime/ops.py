"""The kernels as torch operators, `secateur::sparse_linear` (alone, or with a residual and a norm after it),
`secateur::attention` and `secateur::sparse_chain`, opaque to torch.compile and torch.export.

Inference only: the operators have no backward.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.runtime.native import load_native, share_openmp
from secateur.runtime.packed import ACTIVATIONS, NORMS
from secateur.runtime.steps import FIELDS

_library = torch.library.Library("secateur", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int activation) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "sparse_linear_after(Tensor x, Tensor packed, Tensor? bias, int out_features, int activation, Tensor? residual, "
    "int norm, Tensor? scale, Tensor? shift, float epsilon) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _sparse_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    native = load_native()
    if native is None:
        _check_type(x)
        return _without_kernels(x, packed, bias, activation)
    rows = _matrix(x)
    y, start, end = _job(native, x, rows, packed, bias, out_features, activation)
    native.linear(*start, *end)
    return y


def _sparse_linear_after(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: int,
    residual: torch.Tensor | None,
    norm: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    """norm(activation(x w^T + bias) + residual): residual has the shape of the output, scale and shift are
    (out_features,); norm is one of `NORMS` by number."""
    if residual is not None:
        _check_type(residual)
        if residual.shape != (*x.shape[:-1], out_features):
            raise ValueError(f"the residual is {tuple(residual.shape)}, but the output {(*x.shape[:-1], out_features)}")
    for vector in (scale, shift):
        if vector is not None and (vector.shape != (out_features,) or vector.dtype != torch.float32):
            raise ValueError(
                f"scale and shift of the norm are float32 ({out_features},), not {vector.dtype} {tuple(vector.shape)}"
            )
    native = load_native()
    if native is None:
        _check_type(x)
        y = _without_kernels(x, packed, bias, activation)
        return _norm_without_kernels(y if residual is None else y + residual, norm, scale, shift, epsilon)
    rows = _matrix(x)
    y, start, end = _job(native, x, rows, packed, bias, out_features, activation)
    residual = None if residual is None else _matrix(residual)
    scale, shift = (None if vector is None else vector.contiguous() for vector in (scale, shift))
    native.linear_after(
        *start,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else max(residual.stride(0), out_features),
        norm,
        0 if scale is None else scale.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        epsilon,
        *end,
    )
    return y


def _check_type(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"sparse_linear takes float32 activations, not {x.dtype}; cast them or leave the layer dense")


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x (..., features) as (tokens, features) with the features of a token side by side."""
    features = x.shape[-1]
    x = x if x.dim() == 2 else x.reshape(-1, features)
    return x if x.stride(1) == 1 and x.stride(0) >= features else x.contiguous()


def _job(
    native: Any,
    x: torch.Tensor,
    rows: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: int,
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """An output to be computed of x, whose matrix is `rows`, and the first and last arguments of the native functions
    that do it. They hold addresses: `rows` must live until these have run."""
    _check_type(x)
    tokens, cols = rows.shape
    # The header of `packed` is checked inside; what it says must fit what the tensors can hold.
    _, _, packed_rows, packed_cols, *_ = native.describe(packed.data_ptr(), packed.numel())
    if packed_cols != cols or packed_rows != out_features:
        raise ValueError(
            f"the packed weight is ({packed_rows}, {packed_cols}), but the input has {cols} features and "
            f"{out_features} outputs were asked for"
        )
    y = x.new_empty((*x.shape[:-1], out_features))
    start = (
        packed.data_ptr(),
        packed.numel(),
        rows.data_ptr(),
        tokens,
        rows.stride(0) if tokens > 1 else cols,
        0 if bias is None else bias.data_ptr(),
        activation,
    )
    return y, start, (y.data_ptr(), out_features, torch.get_num_threads(), 0)


def _without_kernels(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: int) -> torch.Tensor:
    from secateur.runtime import reference

    y = torch.nn.functional.linear(x, torch.from_numpy(reference.unpack(packed.numpy())), bias)
    name = ACTIVATIONS[activation]
    if name == "none":
        return y
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    return getattr(torch.nn.functional, name)(y)


def _norm_without_kernels(
    y: torch.Tensor, norm: int, scale: torch.Tensor | None, shift: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    name = NORMS[norm]
    if name == "none":
        return y
    if name == "layer_norm":
        return torch.nn.functional.layer_norm(y, y.shape[-1:], scale, shift, epsilon)
    return torch.nn.functional.rms_norm(y, y.shape[-1:], scale, epsilon)


def _fake(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, *after: Any
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
    mask, added, kept, mask_stride = _mask(mask, (batch, heads, queries, keys))
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


def _mask(
    mask: torch.Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[torch.Tensor | None, int, int, tuple[int, ...]]:
    """A mask of attention (batch, heads, queries, keys) with the keys of a query side by side; its address where it is
    added and where it says what is seen, of which one is 0; and its strides but the last. The mask must live until the
    kernels have run.
    """
    if mask is None:
        return None, 0, 0, (0, 0, 0)
    if mask.dtype not in (torch.float32, torch.bool):
        raise TypeError(f"the mask is float32 or bool, not {mask.dtype}")
    mask = mask.expand(sizes)
    if mask.stride(3) != 1:
        mask = mask[:1, :1].contiguous() if mask.stride()[:2] == (0, 0) else mask.contiguous()
        mask = mask.expand(sizes)
    added, kept = (0, mask.data_ptr()) if mask.dtype == torch.bool else (mask.data_ptr(), 0)
    return mask, added, kept, mask.stride()[:3]


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


_library.define(
    "sparse_chain(Tensor x, Tensor? mask, Tensor[] parts, Tensor steps, Tensor numbers, int heads, int rows) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _sparse_chain(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    parts: list[torch.Tensor],
    steps: torch.Tensor,
    numbers: torch.Tensor,
    heads: int,
    rows: int,
) -> torch.Tensor:
    """A chain of layers over x (batch, tokens, width), float32; gives (batch, tokens, rows). `steps` (count, fields)
    and `numbers` are a table of `secateur.runtime.steps`, with numbers of `parts` for places; parts are packed weights
    and float32 vectors. `heads` are those of every attention, and mask is as for `attention`.
    """
    native = load_native()
    if native is None:
        raise RuntimeError("a chain needs the compiled kernels; run its layers one by one")
    _check_type(x)
    whole = steps.dtype == torch.int64 and numbers.dtype == torch.float32 and steps.shape == (*numbers.shape, FIELDS)
    if x.dim() != 3 or not whole:
        raise ValueError(
            f"a chain takes (batch, tokens, width) and a table of steps, not {tuple(x.shape)} and {tuple(steps.shape)}"
        )
    if any(not part.is_contiguous() or part.dtype not in (torch.uint8, torch.float32) for part in parts):
        raise TypeError("the parts of a chain are packed weights and contiguous float32 vectors")
    batch, tokens, width = x.shape
    x, steps, numbers = x.contiguous(), steps.contiguous(), numbers.contiguous()
    mask, added, kept, stride = _mask(mask, (batch, heads, tokens, tokens))
    y = x.new_empty((batch, tokens, rows))
    native.chain(
        x.data_ptr(),
        y.data_ptr(),
        batch,
        tokens,
        width,
        rows,
        steps.data_ptr(),
        numbers.data_ptr(),
        len(steps),
        [part.data_ptr() for part in parts],
        [part.nbytes for part in parts],
        heads,
        added,
        kept,
        stride,
        torch.get_num_threads(),
        0,
    )
    return y


def _fake_chain(
    x: torch.Tensor, mask: Any, parts: Any, steps: Any, numbers: Any, heads: int, rows: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1], rows))


_library.impl("sparse_chain", _sparse_chain, "CPU")
torch.library.register_fake("secateur::sparse_chain", _fake_chain, lib=_library)
_library.impl("attention", _attention, "CPU")
torch.library.register_fake("secateur::attention", _fake_attention, lib=_library)
_library.impl("sparse_linear", _sparse_linear, "CPU")
torch.library.register_fake("secateur::sparse_linear", _fake, lib=_library)
_library.impl("sparse_linear_after", _sparse_linear_after, "CPU")
torch.library.register_fake("secateur::sparse_linear_after", _fake, lib=_library)
if load_native() is not None:
    share_openmp()

attention = torch.ops.secateur.attention.default
sparse_chain = torch.ops.secateur.sparse_chain.default
sparse_linear = torch.ops.secateur.sparse_linear.default
sparse_linear_after = torch.ops.secateur.sparse_linear_after.default
