"""Packs a sparse weight into one flat buffer that the kernels read (and that can be saved and memory-mapped), and
unpacks it again. Buffers are one-dimensional uint8 arrays; native/src/blob.h describes their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from secateur.kernels import reference
from secateur.kernels.format import (
    ACTIVATIONS,
    BLOCKS,
    FORMATS,
    GROUPS,
    MAX_QUAD_COLUMNS,
    QUAD,
    VALUES,
    VALUES_OF,
    describe,
)
from secateur.kernels.native import isa, isa_code, load_native

BLOCK_CHUNK = 384
"""Columns whose tile of activations shares the L1 cache in the block format."""
BLOCK_CHUNK_INT8 = 1024
"""Columns of a chunk of int8 blocks. One token passes through an int8 block so quickly that the ends of short chunks
would take a noticeable share of the time."""
TILED_CHUNK = 128
"""Columns whose tile of activations shares the L1 cache in the tiled format."""
QUAD_CHUNK = 256
"""Columns whose tile of activations shares the L1 cache in the quad format."""
ACCUMULATORS, ACCUMULATORS_AVX2 = 65536, 12288
"""Outputs of a tile that a block of rows works on: a quarter of an L2 cache of 1 MiB; with AVX2 the number that did
best on a processor with 512 KiB."""


def block_rows_for(rows: int) -> int:
    """Rows that a thread takes at a time in the block format: few enough to share them out evenly."""
    return 32 if rows <= 512 else 64 if rows <= 2048 else 128


def tiled_defaults(isa: str, density: float) -> tuple[int, int]:
    """The (tile, chunk) that did best on the machines tried: tokens side by side, columns that share the L1 cache."""
    if isa == "avx512":
        return (
            (64, 96) if density > 0.3 else (64, 128) if density > 0.15 else (48, 256) if density > 0.07 else (32, 384)
        )
    if isa == "avx2":
        return (32, 128) if density > 0.3 else (32, 192)
    return (32, 128)


def chain_defaults(isa: str, density: float) -> tuple[int, int]:
    """The (tile, chunk) for a chain of layers. Its activations stay in one layout, so tiles are wide at any density."""
    return tiled_defaults(isa, max(density, 0.2))


def row_block_for(rows: int, tile: int, tokens: int = 1, threads: int = 2) -> int:
    """Rows of a block in the tiled format.

    Blocks are of equal size, and their accumulators leave room in the L2 cache. There are as few blocks as `threads`
    threads can share out evenly at `tokens` tokens, because runs of equal rows are longer in large blocks.
    """
    most = max(64, min(1024, (ACCUMULATORS_AVX2 if isa() == "avx2" else ACCUMULATORS) // tile))
    tiles = -(-tokens // tile)
    shares = 1 if threads == 1 else -(-2 * threads // tiles)
    blocks = max(min(shares, rows // 128), -(-rows // most), 1)
    return -(-rows // blocks)


@dataclass(frozen=True)
class _Parameters:
    """The parameters of `pack`; 0 means "chosen by the size of the weight"."""

    tile: int
    chunk: int
    row_block: int
    block: int
    keep: int
    of: int


def pack(
    weight: np.ndarray,
    *,
    format: str = "tiled",
    value: str = "float32",
    tile: int = 32,
    chunk: int = 0,
    row_block: int = 0,
    block: int = 8,
    keep: int = 2,
    of: int = 4,
) -> np.ndarray:
    """Pack a weight (rows = outputs, cols = inputs), float32, for the kernels.

    - `tiled` takes any pattern of zeros and is for many tokens at a time: `tile` tokens (a multiple of 16, at most
      128) are worked on side by side, `chunk` columns at a time, `row_block` rows at a time (0: chosen by size).
    - `block` stores blocks of `block` (4 or 8) rows of one column whole, for any number of tokens; a zero inside
      a block that is kept costs as much as a weight.
    - `bitmask` takes any pattern of zeros and is for few tokens (1 to about 8).
    - `nm` stores exactly `keep` of every `of` columns of a row (1:4, 2:4 or 4:8), for few tokens.
    - `quad` stores four columns of a row (from a multiple of four on) whole, as int8, for many tokens; parameters as
      for `tiled`, chunk a multiple of four, at most 65536 columns. Activations are rounded to 8 bits, each token with
      a scale of its own.

    Raises:
        ValueError: for a weight of the wrong type or shape, an unknown format, impossible parameters, or a weight
            without a finite value in the type (int8 takes no NaN or infinity, float16 nothing beyond 65504).
        RuntimeError: without compiled kernels.
    """
    native = load_native()
    if native is None:
        raise RuntimeError("packing needs the compiled kernels; install a C++17 compiler and reinstall secateur")
    weight = _matrix(weight, "weight")
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if value not in VALUES:
        raise ValueError(f"unknown value type {value!r}: use one of {', '.join(VALUES)}")
    if value not in VALUES_OF[format]:
        raise ValueError(f"format {format!r} does not store {value}: use one of {', '.join(VALUES_OF[format])}")
    _check_range(weight, value)
    return _PACK[format](native, weight, value, _Parameters(tile, chunk, row_block, block, keep, of))


def _pack_tiled(native: ModuleType, weight: np.ndarray, value: str, wanted: _Parameters) -> np.ndarray:
    tile, chunk = wanted.tile, wanted.chunk or TILED_CHUNK
    if not _is_tile(tile) or chunk < 1 or (chunk - 1) * tile * 4 > 65535:
        raise ValueError(
            f"tile {tile} and chunk {chunk} do not fit: tile is a multiple of 16 up to 128, and (chunk - 1) * tile * 4 "
            "must stay below 65536"
        )
    return native.pack_tiled(*_source(weight, value), tile, chunk, wanted.row_block or row_block_for(len(weight), tile))


def _pack_quad(native: ModuleType, weight: np.ndarray, value: str, wanted: _Parameters) -> np.ndarray:
    tile, chunk, cols = wanted.tile, wanted.chunk or QUAD_CHUNK, weight.shape[1]
    if not _is_tile(tile) or chunk % QUAD or chunk < QUAD or (chunk - QUAD) * tile > 65535 or cols > MAX_QUAD_COLUMNS:
        raise ValueError(
            f"tile {tile}, chunk {chunk} and {cols} columns do not fit: tile is a multiple of 16 up to 128, chunk "
            f"one of 4 with (chunk - 4) * tile below 65536, and there are at most {MAX_QUAD_COLUMNS} columns"
        )
    row_block = wanted.row_block or row_block_for(len(weight), tile)
    return native.pack_quad(*_source(weight, value)[:-1], tile, chunk, row_block)


def _pack_block(native: ModuleType, weight: np.ndarray, value: str, wanted: _Parameters) -> np.ndarray:
    block, chunk = wanted.block, wanted.chunk or (BLOCK_CHUNK_INT8 if value == "int8" else BLOCK_CHUNK)
    row_block = wanted.row_block or block_rows_for(len(weight))
    if block not in BLOCKS or not 1 <= chunk <= 65536 or row_block % block:
        raise ValueError(
            f"block {block}, chunk {chunk} and row_block {row_block} do not fit: block is 4 or 8 and divides "
            "row_block, chunk is at most 65536"
        )
    return native.pack_block(*_source(weight, value), block, chunk, row_block)


def _pack_bitmask(native: ModuleType, weight: np.ndarray, value: str, wanted: _Parameters) -> np.ndarray:
    return native.pack_bitmask(*_source(weight, value))


def _pack_nm(native: ModuleType, weight: np.ndarray, value: str, wanted: _Parameters) -> np.ndarray:
    keep, of = wanted.keep, wanted.of
    if (keep, of) not in GROUPS:
        known = ", ".join(f"{n}:{m}" for n, m in GROUPS)
        raise ValueError(f"the nm format has no {keep}:{of}; use one of {known}")
    if not fits_groups(weight != 0, keep, of):
        raise ValueError(f"the weight is not {keep}:{of}: some {of} consecutive weights of a row hold more nonzeros")
    return native.pack_nm(*_source(weight, value), keep, of)


_PACK: dict[str, Callable[[ModuleType, np.ndarray, str, _Parameters], np.ndarray]] = {
    "tiled": _pack_tiled,
    "block": _pack_block,
    "bitmask": _pack_bitmask,
    "quad": _pack_quad,
    "nm": _pack_nm,
}


def _source(weight: np.ndarray, value: str) -> tuple[int, int, int, int, int]:
    """The arguments that every native packer begins with: address, rows, columns, floats from row to row, value type.

    The quad packer takes no value type.
    """
    rows, cols = weight.shape
    return weight.ctypes.data, rows, cols, cols, VALUES.index(value)


def _is_tile(tile: int) -> bool:
    return tile % 16 == 0 and 16 <= tile <= 128


def validate(packed: np.ndarray) -> None:
    """Check every index inside a packed weight of unknown origin, so that no kernel reads or writes outside.

    Raises:
        ValueError: when an index leads outside, a row names a column twice, or the header is damaged.
    """
    describe(packed)
    native = load_native()
    if native is not None:
        native.validate(packed.ctypes.data, packed.nbytes)
    else:
        reference.unpack(packed)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The dense float32 weight (rows, cols) of a packed weight.

    Raises:
        ValueError: when `packed` is not a packed weight, or is damaged.
    """
    native = load_native()
    if native is None:
        return reference.unpack(packed)
    validate(packed)
    info = describe(packed)
    weight = np.empty((info.rows, info.cols), np.float32)
    native.unpack(packed.ctypes.data, packed.nbytes, weight.ctypes.data)
    return weight


def linear(
    packed: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    activation: str = "none",
    threads: int = 1,
    isa: str = "auto",
) -> np.ndarray:
    """activation(x @ weight.T + bias) with x (tokens, cols) and bias (rows), float32; returns (tokens, rows).

    NaN and infinity pass as in a dense product: a zero weight times infinity is NaN. `packed` comes from `pack`, or has
    passed `validate`: only its header is looked at here.

    Raises:
        ValueError: when shapes or types do not fit, or `isa` is not available here.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    info = describe(packed)
    x = np.asarray(x)
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != info.cols:
        raise ValueError(f"x must be float32 (tokens, {info.cols}), not {x.dtype} {x.shape}")
    if bias is not None and (bias.dtype != np.float32 or bias.shape != (info.rows,)):
        raise ValueError(f"bias must be float32 ({info.rows},), not {bias.dtype} {bias.shape}")
    native = load_native()
    if native is None:
        return reference.linear(packed, x, bias, activation)
    if x.strides[1] != 4 or x.strides[0] % 4 or x.strides[0] < 4 * info.cols:
        x = np.ascontiguousarray(x)
    bias = None if bias is None else np.ascontiguousarray(bias)
    y = np.empty((x.shape[0], info.rows), np.float32)
    native.linear(
        packed.ctypes.data,
        packed.nbytes,
        x.ctypes.data,
        x.shape[0],
        x.strides[0] // 4,
        info.cols,
        0 if bias is None else bias.ctypes.data,
        ACTIVATIONS.index(activation),
        y.ctypes.data,
        info.rows,
        threads,
        isa_code(isa),
    )
    return y


def fits_groups(nonzero: np.ndarray, keep: int, of: int) -> bool:
    """Whether at most `keep` of every `of` consecutive columns of a mask (rows, cols) are set."""
    starts = np.arange(0, nonzero.shape[1], of)
    return bool((np.add.reduceat(nonzero, starts, axis=1, dtype=np.uint8) <= keep).all())


def _check_range(weight: np.ndarray, value: str) -> None:
    if value == "int8" and not np.isfinite(weight).all():
        raise ValueError("int8 cannot hold a NaN or infinite weight; use float32 or bfloat16")
    if value == "float16" and np.isfinite(weight).all() and np.abs(weight).max() > 65504:
        raise ValueError(f"float16 cannot hold a weight of {np.abs(weight).max():g}; use float32 or bfloat16")


def _matrix(a: np.ndarray, name: str) -> np.ndarray:
    if not isinstance(a, np.ndarray) or a.dtype != np.float32 or a.ndim != 2 or 0 in a.shape:
        what = f"{a.dtype} {a.shape}" if isinstance(a, np.ndarray) else type(a).__name__
        raise ValueError(f"{name} must be a float32 numpy matrix with at least one row and column, not {what}")
    return np.ascontiguousarray(a)
