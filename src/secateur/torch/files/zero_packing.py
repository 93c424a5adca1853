"""Weights with many zeros as a bitmask and the non-zero values, in safetensors files.

n elements with z zeros take n/8 bytes + (n - z) values. A zero is an element whose bits are all zero: -0.0 and NaN are
values and come back bit for bit. The most significant bit of each byte comes first, as in `numpy.packbits`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import ModelError
from secateur.torch.files.safetensors_header import INDEX

BITS = ":secateur_bits"
VALUES = ":secateur_values"
_WORD = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_LEAST_BYTES = 1024
"""The least number of bytes that packing must save, because it adds two entries to the header of the file."""


def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a tensor into its non-zero pattern, uint8 of ceil(n / 8), and the non-zero values in row-major order.

    Raises ModelError for other types than float32, float16 and bfloat16.
    """
    if tensor.dtype not in _WORD:
        raise ModelError(f"a tensor of {tensor.dtype} cannot be packed; float32, float16 and bfloat16 can")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words = flat.view(_WORD[tensor.dtype])
    used = words != 0
    return torch.from_numpy(np.packbits(used.numpy())), words[used].view(tensor.dtype)


def unpack(bits: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that `pack` split, on the device of `values`.

    Values are written as integers, because torch changes NaNs when it assigns a single float.

    Raises:
        ModelError: when there are not as many bits or values as a tensor of `shape` has, or values have another type.
    """
    if values.dtype not in _WORD:
        raise ModelError(f"packed values of {values.dtype} are not weights; float32, float16 and bfloat16 are")
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != -(-count // 8) or values.dim() != 1:
        raise ModelError(f"{bits.numel()} bytes of bits and values of {tuple(values.shape)} cannot be {shape}")
    used = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool))
    if int(used.sum()) != values.numel():
        raise ModelError(f"the bits mark {int(used.sum())} weights of {shape}, but there are {values.numel()} values")
    words = torch.zeros(count, dtype=_WORD[values.dtype], device=values.device)
    words[used.to(values.device)] = values.view(words.dtype)
    return words.view(values.dtype).reshape(shape)


def pays(tensor: torch.Tensor) -> bool:
    """Whether packing makes a tensor smaller by at least a tenth and a kilobyte."""
    if tensor.dtype not in _WORD or tensor.numel() == 0:
        return False
    dense = tensor.numel() * tensor.element_size()
    used = int(torch.count_nonzero(tensor.detach().contiguous().reshape(-1).view(_WORD[tensor.dtype])))
    packed = tensor.numel() / 8 + used * tensor.element_size()
    return packed <= 0.9 * dense and dense - packed >= _LEAST_BYTES


def pack_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict in which each tensor that packing makes smaller is replaced by its bits and its values."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if pays(tensor):
            result[name + BITS], result[name + VALUES] = pack(tensor)
        else:
            result[name] = tensor
    return result


def unpack_state(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The state dict that `pack_state` packed; ModelError when a packed tensor does not have the expected shape."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(BITS):
            plain = name.removesuffix(BITS)
            if plain not in shapes or plain + VALUES not in state:
                raise ModelError(f"the file holds {name}, which belongs to no weight of the model")
            result[plain] = unpack(tensor, state[plain + VALUES], shapes[plain])
        elif not name.endswith(VALUES):
            result[name] = tensor
    return result


def pack_folder(folder: Path) -> bool:
    """Pack the safetensors files of a checkpoint, with its shards and index; returns whether any tensor was packed."""
    index_path = folder / INDEX
    new_names: dict[str, list[str]] = {}
    saved_bytes = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        packed = pack_state(state)
        if packed.keys() == state.keys():
            continue
        for name in state.keys() - packed.keys():
            new_names[name] = [name + BITS, name + VALUES]
        saved_bytes += sum(t.nbytes for t in state.values()) - sum(t.nbytes for t in packed.values())
        save_file(packed, path.with_suffix(".tmp"), metadata=metadata)
        os.replace(path.with_suffix(".tmp"), path)
    if new_names and index_path.exists():
        index = json.loads(index_path.read_text(encoding="utf-8"))
        weights = index["weight_map"]
        index["weight_map"] = {new: file for name, file in weights.items() for new in new_names.get(name, [name])}
        index.get("metadata", {})["total_size"] = index.get("metadata", {}).get("total_size", 0) - saved_bytes
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return bool(new_names)


def plain_name(key: str) -> str:
    """The parameter that a tensor of a file belongs to, packed or not."""
    return key.removesuffix(BITS).removesuffix(VALUES)
