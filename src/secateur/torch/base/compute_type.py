"""The type in which a model computes: float32 where it is pruned; products in bfloat16 where the processor gains."""

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
def products_in(low: bool) -> Iterator[None]:
    """Matrix products in bfloat16 while the context lasts, if `low`; weights keep their type."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if low else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A model whose parameters and buffers are of `dtype` while the context lasts, then of their own types again:
    values of narrower types come back as they were. ModelError for parameters of wider ones, which would not.
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
        for tensor, before in narrow:
            tensor.data = tensor.data.to(before)
