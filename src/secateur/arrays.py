"""What differs between array libraries, so that the rest of the core works with any of them."""

from typing import Any, TypeAlias

import array_api_compat
import numpy as np

Array: TypeAlias = Any
"""numpy array, torch tensor, or another array of the array API."""


def namespace(*arrays: Array) -> Any:
    """The array API namespace of the arrays (numpy, torch, ...)."""
    return array_api_compat.array_namespace(*arrays)


def to_numpy(array: Array) -> np.ndarray:
    """The array as numpy: without a copy where it is in main memory; float16 and bfloat16 of torch become float32."""
    if isinstance(array, np.ndarray):
        return array
    if array_api_compat.is_torch_array(array):
        array = array.detach().cpu().resolve_conj().resolve_neg()
        return array.float().numpy() if array.dtype.itemsize == 2 and array.dtype.is_floating_point else array.numpy()
    return np.asarray(array)


def single(array: Array) -> Array:
    """The array in float32 where it is float16 or bfloat16, in which sums lose small terms and squares underflow."""
    narrow = array.dtype.itemsize == 2 and "float" in str(array.dtype)
    xp = namespace(array)
    return xp.astype(array, xp.float32) if narrow else array


def all_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite."""
    xp = namespace(array)
    if not xp.isdtype(array.dtype, "real floating") or not array_api_compat.size(array):
        return bool(xp.all(xp.isfinite(array)))
    # NaN passes through a maximum, and two passes without a copy are twice as fast as a test of every element
    return bool(xp.isfinite(xp.max(array))) and bool(xp.isfinite(xp.min(array)))
