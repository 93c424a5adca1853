"""The one way by which a tensor becomes a packed weight that the kernels read: its header and every index are
validated, once for each memory, because kernels follow the indices without a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from secateur.kernels.format import LINEAR, STEP_FIELDS, describe
from secateur.kernels.packing import validate


def checked_packed(packed: Any, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """A packed weight of unknown origin, validated; a copy where its memory is not aligned.

    Args:
        packed: what should be a packed weight.
        shape: (out, in) of the weight, where they are known.

    Raises:
        ValueError: when it is no packed weight, is damaged, or has another shape.
    """
    if not isinstance(packed, torch.Tensor):
        raise ValueError(f"a packed weight is a tensor, not {type(packed).__name__}; pack the weight again")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device.type != "cpu" or not packed.is_contiguous():
        raise ValueError(
            f"a packed weight is a flat, contiguous uint8 tensor on the CPU, not {packed.dtype} {tuple(packed.shape)} "
            f"on {packed.device.type}; pack the weight again"
        )
    packed = packed.clone() if packed.data_ptr() % 8 else packed
    array = packed.detach().numpy()
    validate(array)
    info = describe(array)
    if shape is not None and shape != (info.rows, info.cols):
        raise ValueError(f"the packed weight is ({info.rows}, {info.cols}), but the layer {shape}; pack its own weight")
    return packed


def checked_vector(vector: Any, length: int, what: str) -> torch.Tensor | None:
    """A bias, scale or shift of unknown origin, or None.

    Raises:
        ValueError: when it is not a contiguous float32 tensor of that length on the CPU.
    """
    if vector is None:
        return None
    if not isinstance(vector, torch.Tensor):
        raise ValueError(f"{what} must be float32 ({length},), not {type(vector).__name__}")
    if tuple(vector.shape) != (length,) or vector.dtype != torch.float32:
        raise ValueError(f"{what} must be float32 ({length},), not {vector.dtype} {tuple(vector.shape)}")
    if vector.device.type != "cpu" or not vector.is_contiguous():
        raise ValueError(f"{what} must be contiguous on the CPU, not on {vector.device.type}")
    return vector


_validated: dict[tuple[int, int, int], tuple[StorageWeakRef, int]] = {}
"""Memory that `check_once` has validated: (storage, address, bytes) -> the storage, and the version of the tensor."""


def check_once(packed: torch.Tensor) -> None:
    """Validate a packed weight unless that was done and the tensor has not been written to since.

    Raises:
        ValueError: as `checked_packed`, and when the memory is not aligned.
    """
    storage = packed.untyped_storage()
    key, version = (storage._cdata, packed.data_ptr(), packed.nbytes), 0 if packed.is_inference() else packed._version
    known = _validated.get(key)
    if known is not None and known[1] == version and not known[0].expired():
        return
    if packed.data_ptr() % 8:
        raise ValueError("a packed weight must start at a multiple of 8 bytes; copy it to fresh memory")
    checked_packed(packed)
    for other, (reference, _) in list(_validated.items()):
        if reference.expired():
            _validated.pop(other, None)
    _validated[key] = (StorageWeakRef(storage), version)


def check_parts(parts: Sequence[torch.Tensor], steps: torch.Tensor) -> None:
    """Validate the packed weights among the parts of a chain as `check_once` does.

    Raises:
        ValueError: as `check_once`, and when a step of the table names a vector as its packed weight.
    """
    for part in parts:
        if part.dtype == torch.uint8:
            check_once(part)
    if steps.dim() == 2 and steps.shape[1] == STEP_FIELDS:
        named = steps[steps[:, 0] == LINEAR, 7].tolist()
        if any(0 <= index < len(parts) and parts[index].dtype == torch.float32 for index in named):
            raise ValueError("a step of the chain names a vector as its packed weight")
