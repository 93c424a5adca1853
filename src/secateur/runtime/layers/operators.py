"""The kernels as torch operators, `secateur::sparse_linear` (also with a gate, a residual and a norm after it),
`secateur::norm`, `secateur::attention` and `secateur::sparse_chain`, opaque to torch.compile and torch.export.

Inference only: the operators have no backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from secateur.kernels.format import ACTIVATIONS, NORMS, STEP_FIELDS
from secateur.kernels.native import load_native, share_openmp
from secateur.kernels.reference import unpack
from secateur.runtime.layers.packed import check_once, check_parts, checked_vector

_library = torch.library.Library("secateur", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int activation) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "sparse_linear_after(Tensor x, Tensor packed, Tensor? bias, int out_features, int activation, Tensor? gate, "
    "Tensor? residual, int norm, Tensor? scale, Tensor? shift, float epsilon) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define("norm(Tensor x, int norm, Tensor? scale, Tensor? shift, float epsilon) -> Tensor")


def run(operator: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """operator(x, *args), without torch's dispatcher where nobody can notice its absence.

    The dispatcher takes 10 microseconds a call, half of the time that a small layer needs for a token. Packed weights
    and biases have to be those of a `SparseLinear`, which has validated them: only calls through the dispatcher, which
    anybody can make, look at them.
    """
    return _KERNELS[operator](x, *args) if is_eager(x) else operator(x, *args)


_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_eager(x: torch.Tensor) -> bool:
    """Whether no compiler, tracer, mode, transform or profiler is active, and x is a plain tensor."""
    return (
        not _is_compiling()
        and type(x) is torch.Tensor
        and not _modes()
        and not _functions()
        and _transform() is None
        and not _is_tracing()
        and not profiler._is_profiler_enabled
    )


def _sparse_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    native = load_native()
    _check_type(x)
    if native is None:
        return _without_kernels(x, packed, bias, activation)
    matrix, tokens, stride = _matrix(x)
    y = x.new_empty(*x.shape[:-1], out_features)  # torch reads numbers faster than a tuple of them
    native.linear(
        packed.data_ptr(),
        packed.numel(),
        matrix.data_ptr(),
        tokens,
        stride,
        x.shape[-1],
        _address(bias),
        activation,
        y.data_ptr(),
        out_features,
        torch.get_num_threads(),
        0,
    )
    return y


def _sparse_linear_after(  # noqa: PLR0917  # the order is that of the operator's schema
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: int,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    """norm(activation(x w^T + bias) * gate + residual).

    gate and residual have the shape of the output, scale and shift are (out_features,); norm is an index into `NORMS`.
    """
    # The order of the arguments is that of the operator's schema, in which torch passes them.
    _check_type(x)
    shape = (*x.shape[:-1], out_features)
    for name, operand in (("gate", gate), ("residual", residual)):
        if operand is not None:
            _check_type(operand)
            if operand.shape != shape:
                raise ValueError(f"the {name} is {tuple(operand.shape)}, but the output {shape}")
    scale, shift = _of_norm(scale, out_features), _of_norm(shift, out_features)
    native = load_native()
    if native is None:
        y = _without_kernels(x, packed, bias, activation)
        y = y if gate is None else y * gate
        return _norm_without_kernels(y if residual is None else y + residual, norm, scale, shift, epsilon)
    matrix, tokens, stride = _matrix(x)
    gate, _, gate_stride = (None, 0, 0) if gate is None else _matrix(gate)
    residual, _, residual_stride = (None, 0, 0) if residual is None else _matrix(residual)
    y = x.new_empty(*shape)
    native.linear_after(
        packed.data_ptr(),
        packed.numel(),
        matrix.data_ptr(),
        tokens,
        stride,
        x.shape[-1],
        _address(bias),
        activation,
        _address(gate),
        gate_stride,
        _address(residual),
        residual_stride,
        norm,
        _address(scale),
        _address(shift),
        epsilon,
        y.data_ptr(),
        out_features,
        torch.get_num_threads(),
        0,
    )
    return y


def _norm(
    x: torch.Tensor, norm: int, scale: torch.Tensor | None, shift: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """A norm over the last dimension of x (..., width); norm is an index into `NORMS`, scale and shift are (width,)."""
    _check_type(x)
    width = x.shape[-1]
    scale, shift = _of_norm(scale, width), _of_norm(shift, width)
    native = load_native()
    if native is None:
        return _norm_without_kernels(x, norm, scale, shift, epsilon)
    matrix, tokens, stride = _matrix(x)
    y = x.new_empty(x.shape)
    native.norm(
        matrix.data_ptr(),
        tokens,
        width,
        stride,
        norm,
        _address(scale),
        _address(shift),
        epsilon,
        y.data_ptr(),
        torch.get_num_threads(),
        0,
    )
    return y


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_type(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"sparse_linear takes float32 activations, not {x.dtype}; cast them or leave the layer dense")


def _of_norm(vector: torch.Tensor | None, width: int) -> torch.Tensor | None:
    if vector is None:
        return None
    if vector.shape != (width,) or vector.dtype != torch.float32:
        raise ValueError(
            f"scale and shift of the norm are float32 ({width},), not {vector.dtype} {tuple(vector.shape)}"
        )
    return vector.contiguous()


def _matrix(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x (..., features) as a matrix (tokens, features) with contiguous rows.

    Returns the tensor, which must live until the kernels have run, the number of tokens, and the floats from token to
    token.
    """
    features = x.shape[-1]
    if x.is_contiguous():
        return x, x.numel() // max(1, features), features
    x = x if x.dim() == 2 else x.reshape(-1, features)
    x = x if x.stride(1) == 1 and x.stride(0) >= features else x.contiguous()
    return x, len(x), x.stride(0) if len(x) > 1 else features


def _without_kernels(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: int) -> torch.Tensor:
    return activated(torch.nn.functional.linear(x, torch.from_numpy(unpack(packed.numpy())), bias), activation)


def activated(y: torch.Tensor, activation: int) -> torch.Tensor:
    """An activation, an index into `ACTIVATIONS`, computed by torch."""
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
    """softmax(scale q k^T + mask) v for q (batch, heads, queries, width) and k, v (batch, kv heads, keys, width).

    All are float32. The mask has four dimensions that broadcast; it is added, or (bool) says which keys are seen.
    Returns (batch, queries, heads, width).
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
    mask, added, kept, mask_stride = mask_of(mask, (batch, heads, queries, keys))
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


def mask_of(
    mask: torch.Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[torch.Tensor | None, int, int, tuple[int, ...]]:
    """A mask of attention for the kernels.

    Returns the mask (batch, heads, queries, keys) with contiguous keys, which must live until the kernels have run; its
    address if it is added, else 0; its address if it is bool, else 0; and its strides over batch, heads and queries.
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
    """A chain of layers over x (batch, tokens, width), float32; returns (batch, tokens, rows).

    `steps` (count, fields) and `numbers` are a table of `secateur.kernels.steps`, in which weights and vectors are
    indices into `parts`: packed weights and float32 vectors. `heads` is the number of heads of every attention, and
    mask is as for `attention`.
    """
    native = load_native()
    if native is None:
        raise RuntimeError("a chain needs the compiled kernels; run its layers one by one")
    _check_type(x)
    has_types = steps.dtype == torch.int64 and numbers.dtype == torch.float32
    if x.dim() != 3 or not has_types or steps.shape != (*numbers.shape, STEP_FIELDS):
        raise ValueError(
            f"a chain takes (batch, tokens, width) and a table of steps, not {tuple(x.shape)} and {tuple(steps.shape)}"
        )
    if any(not part.is_contiguous() or part.dtype not in (torch.uint8, torch.float32) for part in parts):
        raise TypeError("the parts of a chain are packed weights and contiguous float32 vectors")
    batch, tokens, width = x.shape
    x, steps, numbers = x.contiguous(), steps.contiguous(), numbers.contiguous()
    mask, added, kept, stride = mask_of(mask, (batch, heads, tokens, tokens))
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


def _fake_norm(x: torch.Tensor, *norm: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _of_anybody(kernels: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A linear operator on a weight and a bias that nobody has validated."""

    def call(x: Any, packed: Any, bias: Any, out_features: int, *rest: Any) -> torch.Tensor:
        check_once(packed)
        return kernels(x, packed, checked_vector(bias, out_features, "bias"), out_features, *rest)

    return call


def _chain_of_anybody(x: Any, mask: Any, parts: Any, steps: Any, *rest: Any) -> torch.Tensor:
    """`_sparse_chain` on parts that nobody has validated."""
    check_parts(parts, steps)
    return _sparse_chain(x, mask, parts, steps, *rest)


def _operator(name: str, kernels: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> Any:
    _library.impl(name, kernels, "CPU")
    torch.library.register_fake(f"secateur::{name}", fake, lib=_library)
    return getattr(torch.ops.secateur, name).default


if load_native() is not None:
    share_openmp()

attention = _operator("attention", _attention, _fake_attention)
norm = _operator("norm", _norm, _fake_norm)
sparse_chain = _operator("sparse_chain", _chain_of_anybody, _fake_chain)
sparse_linear = _operator("sparse_linear", _of_anybody(_sparse_linear), _fake)
sparse_linear_after = _operator("sparse_linear_after", _of_anybody(_sparse_linear_after), _fake)
_KERNELS: dict[Any, Callable[..., torch.Tensor]] = {
    attention: _attention,
    norm: _norm,
    sparse_chain: _sparse_chain,
    sparse_linear: _sparse_linear,
    sparse_linear_after: _sparse_linear_after,
}
