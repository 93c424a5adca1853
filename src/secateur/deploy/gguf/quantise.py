"""Which type of numbers each tensor of a GGUF file gets, as llama.cpp's own quantiser chooses (without an importance
matrix), and the quantising itself, by llama.cpp's code.

A row is stored in blocks of 32 numbers (q8_0, q4_0) or of 256 (k-quants). A tensor whose rows are no multiple of that
falls back to a larger type. So the rows of the down projection, which pruning makes of any length, are filled up with
neurons of zeros to a multiple of 32.
"""

import ctypes
import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.deploy.gguf.decoder import Layer
from secateur.deploy.target import DeployError

BLOCK, K_BLOCK = 32, 256
SHOWN = 4
"""How many lengths of rows a sentence names."""


@dataclass(frozen=True)
class Format:
    """A way to store weights.

    usual: the type of most matrices. output: of the output layer. important: of those value and down projections that
    llama.cpp's mixtures store better.
    file: number of the mixture in `general.file_type`.
    tolerance: largest permitted relative error of the log probabilities; None where it is only reported.
    """

    usual: str
    output: str
    important: str
    file: int
    tolerance: float | None


FORMATS = {
    "f32": Format("F32", "F32", "F32", 0, 1e-4),
    "f16": Format("F16", "F16", "F16", 1, 1e-2),
    "bf16": Format("BF16", "BF16", "BF16", 32, 1e-1),
    "q8_0": Format("Q8_0", "Q8_0", "Q8_0", 7, 0.25),
    "q6_k": Format("Q6_K", "Q6_K", "Q6_K", 18, None),
    "q5_k_m": Format("Q5_K", "Q6_K", "Q6_K", 17, None),
    "q4_k_m": Format("Q4_K", "Q6_K", "Q6_K", 15, None),
    "q4_0": Format("Q4_0", "Q6_K", "Q4_0", 2, None),
}
"""The formats that `export` writes, by the names that people use."""
BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.5625,
    "Q5_K": 5.5,
    "Q5_1": 6.0,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "Q4_0": 4.5,
}
"""Bits that a weight takes, with the scales of its block."""
SMALLER_BLOCKS = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
"""What llama.cpp takes instead of a type with blocks of 256."""
PLAIN = ("F32", "F16", "BF16")


def find(name: str) -> Format:
    """A format by its name, in any case; DeployError when there is none."""
    if name.lower() not in FORMATS:
        raise DeployError(f"no format {name!r} for GGUF; there is {', '.join(FORMATS)}")
    return FORMATS[name.lower()]


def block_of(form: Format) -> int:
    """How many numbers of a row are stored together in most matrices: rows that are multiples of it fall back to no
    larger type."""
    return K_BLOCK if form.usual in SMALLER_BLOCKS else 1 if form.usual in PLAIN else BLOCK


def fitting(kind: str, row: int) -> str:
    """The type, or what llama.cpp takes instead for rows of that length."""
    if kind in SMALLER_BLOCKS and row % K_BLOCK:
        kind = SMALLER_BLOCKS[kind]
    return "F16" if kind not in PLAIN and row % BLOCK else kind


def wanted(form: Format, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The type of every tensor if all rows fitted. shapes: name -> (rows, row length), or one number for vectors, which
    stay float32."""
    last = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    values = [name for name in shapes if name.endswith("attn_v.weight")]
    downs = [name for name in shapes if name.endswith("ffn_down.weight")]
    important = {name for group in (values, downs) for i, name in enumerate(group) if _more_bits(i, len(group))}
    chosen = {}
    for name, shape in shapes.items():
        matrix = form.output if name == last else form.important if name in important else form.usual
        chosen[name] = matrix if len(shape) > 1 else "F32"
    return chosen


def types(form: Format, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The type of every tensor, as `wanted` or what its rows permit."""
    return {name: fitting(kind, shapes[name][-1]) for name, kind in wanted(form, shapes).items()}


def _more_bits(i: int, count: int) -> bool:
    """Whether the i-th of the value or down projections is among those that llama.cpp stores better."""
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2


def filled_up(form: Format, layers: Sequence[Layer]) -> list[Layer]:
    """The layers with neurons of zeros up to a multiple of 32, for formats with blocks."""
    if form.usual in PLAIN:
        return list(layers)
    return [Layer(layer.heads, layer.kv, -(-layer.ffn // BLOCK) * BLOCK) for layer in layers]


def words(name: str, form: Format, shapes: Mapping[str, Sequence[int]], added: int) -> list[str]:
    """Sentences on what the sizes of a model cost in a format.

    added: neurons of zeros that fill up blocks.
    """
    sentences = []
    if added:
        sentences.append(
            f"{added} neurons of zeros fill up blocks of {BLOCK}; prune to multiples of {BLOCK} to save them"
        )
    usual, chosen = wanted(form, shapes), types(form, shapes)
    for block in (K_BLOCK, BLOCK):
        fallen = [tensor for tensor in shapes if _reason(usual[tensor], chosen[tensor]) == block]
        if not fallen:
            continue
        more = sum(math.prod(shapes[t]) * (BITS[chosen[t]] - BITS[usual[t]]) / 8e6 for t in fallen)
        rows = sorted({shapes[tensor][-1] for tensor in fallen})
        some = ", ".join(map(str, rows[:SHOWN])) + (" ..." if len(rows) > SHOWN else "")
        sentences.append(
            f"rows of {some} are no multiple of {block}: {len(fallen)} of {len(shapes)} tensors are stored in larger "
            f"types than {name} has, which takes {more:.1f} MB more"
        )
    return sentences


def _reason(kind: str, chosen: str) -> int:
    """The block that rows do not fit where another type was chosen than wanted; 0 where it was not."""
    return 0 if kind == chosen else BLOCK if chosen == "F16" else K_BLOCK


@functools.cache
def _library() -> ctypes.CDLL:
    """llama.cpp, as the wheel of xllamacpp brings it. Only functions of ggml.h that take plain numbers and pointers are
    called here."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise DeployError("xllamacpp is not installed; `pip install 'secateur[gguf]'`")
    library = ctypes.CDLL(spec.origin)
    try:
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
    except AttributeError:
        raise DeployError(
            "this xllamacpp does not offer llama.cpp's quantiser; install the version that secateur[gguf] names, or "
            "export f32 or f16"
        ) from None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return library


def quantised(array: np.ndarray, kind: str) -> np.ndarray:
    """The values (rows, row length) in a type of GGUF: float32 or float16, else bytes (rows, bytes of a row)."""
    import gguf  # optional: the extra gguf

    array = np.ascontiguousarray(array, np.float32)
    if kind in ("F32", "F16"):
        return array.astype(np.float32 if kind == "F32" else np.float16)
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, length = array.shape
    out = np.empty((rows, length // block * size), np.uint8)
    done = _library().ggml_quantize_chunk(int(number), array.ctypes.data, out.ctypes.data, 0, rows, length, None)
    if done != out.nbytes:
        raise DeployError(
            f"llama.cpp stored {done} bytes of {kind}, where {out.nbytes} were expected; update the extra gguf"
        )
    return out
