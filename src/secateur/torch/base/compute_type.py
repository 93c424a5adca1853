"""The type in which a model computes: float32 while it is pruned, matrix products in bfloat16 where that is faster."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from secateur.errors import ModelError


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@contextlib.contextmanager
def products_in(*, low_precision: bool) -> Iterator[None]:
    """A context in which matrix products are computed in bfloat16 if `low_precision`; weights keep their type."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if low_precision else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the parameters and buffers of a model have the type `dtype`.

    Afterwards they have their own types again; values of narrower types come back unchanged.

    Raises:
        ModelError: when a parameter has a wider type, whose values would not come back.
    """
    narrow = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize:
            narrow.append((tensor, tensor.dtype))
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype != dtype:
            raise ModelError(f"{name} is {tensor.dtype}, and blocks are pruned in {dtype}; pass model.float()")
    for tensor, _ in narrow:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, own_type in narrow:
            tensor.data = tensor.data.to(own_type)
