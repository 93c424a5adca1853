"""Products in bfloat16 where the processor is faster in them."""

import contextlib
from collections.abc import Iterator

import torch


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@contextlib.contextmanager
def products_in(low: bool) -> Iterator[None]:
    """Matrix products in bfloat16 while the context lasts, if `low`; weights keep their type."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if low else contextlib.nullcontext():
        yield
