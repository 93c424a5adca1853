"""Reads packed weights in plain numpy: the slow path where no kernels are compiled, and the reference that the kernels
are tested against. native/src/blob.h describes the layout.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from secateur.kernels.format import DAMAGED, HEADER_BYTES, PackedInfo, describe


def unpack(packed: np.ndarray) -> np.ndarray:
    """The dense float32 weight (rows, cols).

    Raises:
        ValueError: when `packed` is not a packed weight, is damaged, or names a column of a row twice.
    """
    info = describe(packed)
    try:
        return _UNPACK[info.format](packed, info)
    except (ArithmeticError, IndexError, MemoryError, TypeError, ValueError) as error:
        raise ValueError(DAMAGED) from error


class _Dense:
    """A weight that is filled. A place that is filled twice raises ValueError: kernels would add up what stands there.

    repeats_zeros: whether a zero may stand where something stands already.
    """

    def __init__(self, shape: tuple[int, ...], *, repeats_zeros: bool = False):
        self.weight, self.named = np.zeros(shape, np.float32), np.zeros(shape, bool)
        self.repeats_zeros = repeats_zeros

    def put(self, index: tuple[Any, ...], values: np.ndarray) -> None:
        """weight[index] = values, where the index has an array for each dimension."""
        index = tuple(np.broadcast_arrays(*index, values)[:-1])
        named = values != 0 if self.repeats_zeros else np.ones(values.shape, bool)
        flat = np.ravel_multi_index(tuple(np.ascontiguousarray(i) for i in index), self.weight.shape)
        chosen = flat[np.broadcast_to(named, flat.shape)]
        if self.named.ravel()[flat].any() or np.unique(chosen).size != chosen.size:
            raise ValueError("a row names a column twice")
        self.weight[index] = values
        self.named.ravel()[chosen] = True


def linear(packed: np.ndarray, x: np.ndarray, bias: np.ndarray | None, activation: str) -> np.ndarray:
    """activation(x @ weight.T + bias), by unpacking the weight each time."""
    y = x @ unpack(packed).T
    if bias is not None:
        y = y + bias
    return _ACTIVATE[activation](y).astype(np.float32)


def _section(packed: np.ndarray, i: int, dtype: str) -> np.ndarray:
    begin, end = np.frombuffer(packed[:HEADER_BYTES].tobytes(), "<u8", 7, 56)[[i, i + 1]].tolist()
    return packed[begin:end].view(dtype)


def _values(raw: np.ndarray, value: str) -> np.ndarray:
    """Stored bytes (..., n) as float32."""
    raw = np.ascontiguousarray(raw)
    if value == "float32":
        return raw.view("<f4")
    if value == "float16":
        return raw.view("<f2").astype("<f4")
    if value == "int8":
        return raw.view("i1").astype("<f4")
    return (raw.view("<u2").astype("<u4") << 16).view("<f4")


def _unpack_tiled(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    dense = _Dense((info.rows, info.cols), repeats_zeros=True)  # zeros that fill up a row may do so in two chunks
    chunks = math.ceil(info.cols / info.chunk)
    n_blocks = math.ceil(info.rows / info.row_block) * chunks
    blocks = _section(packed, 0, "<u8")[: 3 * n_blocks].reshape(n_blocks, 3)
    runs, rows = _section(packed, 1, "<u4"), _section(packed, 2, "<u4")
    runs = runs[: runs.size // 3 * 3].reshape(-1, 3)
    stream = _section(packed, 3, "u1")
    stride, group = info.tile * 4, 24 if info.value == "float32" else 16
    carried = int(np.frombuffer(packed[:HEADER_BYTES].tobytes(), "<u8", 1, 112)[0])
    wide = 2 * group - 8  # bytes of a group that two rows share
    for b in range(n_blocks):
        seen = max(0, b % chunks * info.chunk - carried)
        at, begin, row = int(blocks[b, 0]), int(blocks[b, 1]) & 0xFFFFFFFF, int(blocks[b, 2]) & 0xFFFFFFFF
        for count, kinds, n in runs[begin : begin + (int(blocks[b, 1]) >> 32)].tolist():
            shared, together = kinds & 0xFFFF, 2 if kinds >> 16 == 2 else 1
            n, groups, rest = n // together, -(-(count - shared) // 4), count % 4
            size = groups * together * group + shared // 4 * wide
            raw = stream[at : at + n * size].reshape(n, size)
            own = raw[:, : groups * together * group].reshape(n, groups, together, group)
            common = raw[:, groups * together * group :].reshape(n, shared // 4, wide)
            keep = np.ones(groups * 4, bool)
            if rest:
                keep[rest:4] = False
            for i in range(together):
                r = (
                    b // chunks * info.row_block
                    + rows[row + i : row + n * together : together].astype(np.int64) // stride
                )
                first = i * (group - 8)  # of the values in a shared group
                for part, v, kept in ((own[:, :, i], 0, keep), (common, first, np.ones(shared, bool))):
                    values = _values(part[:, :, v : v + group - 8], info.value).reshape(n, kept.size)[:, kept]
                    offsets = np.ascontiguousarray(part[:, :, -8:]).view("<u2").reshape(n, kept.size)[:, kept]
                    dense.put((r[:, None], seen + offsets.astype(np.int64) // stride), values)
            at, row = at + raw.size, row + n * together
    return dense.weight


def _scales(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    """(rows, 1), for int8; ones otherwise."""
    if info.value != "int8":
        return np.ones((info.rows, 1), np.float32)
    return _section(packed, 3, "<f4")[: info.rows, None]


def _unpack_block(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    dense = _Dense((math.ceil(info.rows / info.block) * info.block, info.cols))
    starts, columns = _section(packed, 0, "<u4"), _section(packed, 1, "<u2")
    values = _values(_section(packed, 2, "u1"), info.value)
    i = 0
    for row in range(0, info.rows, info.row_block):
        for col in range(0, info.cols, info.chunk):
            for group in range(row, min(row + info.row_block, info.rows), info.block):
                begin, end = int(starts[i]), int(starts[i + 1])
                kept = values[begin * info.block : end * info.block].reshape(end - begin, info.block)
                dense.put((np.arange(group, group + info.block)[:, None], col + columns[begin:end].astype(int)), kept.T)
                i += 1
    return dense.weight[: info.rows] * _scales(packed, info)


def _unpack_bitmask(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    words = math.ceil(info.cols / 64)
    masks = _section(packed, 1, "u1")[: info.rows * words * 8].reshape(info.rows, words * 8)
    kept = np.unpackbits(masks, axis=1, bitorder="little")[:, : info.cols].astype(bool)
    weight = np.zeros((info.rows, info.cols), np.float32)
    weight[kept] = _values(_section(packed, 2, "u1"), info.value)[: kept.sum()]
    return weight * _scales(packed, info)


def _unpack_quad(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    dense = _Dense((info.rows, math.ceil(info.cols / 4), 4))
    chunks = math.ceil(info.cols / info.chunk)
    n_blocks = math.ceil(info.rows / info.row_block) * chunks
    blocks = _section(packed, 0, "<u8")[: 3 * n_blocks].reshape(n_blocks, 3)
    classes, rows = _section(packed, 1, "<u4").reshape(-1, 2), _section(packed, 2, "<u4")
    stream, stride = _section(packed, 3, "u1"), info.tile * 4
    for b in range(n_blocks):
        at, begin, row = int(blocks[b, 0]), int(blocks[b, 1]) & 0xFFFFFFFF, int(blocks[b, 2]) & 0xFFFFFFFF
        for count, n in classes[begin : begin + (int(blocks[b, 1]) >> 32)].tolist():
            groups, rest = -(-count // 4), count % 4
            raw = stream[at : at + n * groups * 24].reshape(n, groups, 24)
            keep = np.ones(groups * 4, bool)
            keep[rest if rest else 4 : 4] = False
            values = np.ascontiguousarray(raw[:, :, :16]).view("i1").reshape(n, -1, 4)[:, keep]
            offsets = np.ascontiguousarray(raw[:, :, 16:]).view("<u2").reshape(n, -1)[:, keep]
            r = b // chunks * info.row_block + rows[row : row + n].astype(np.int64) // stride
            quad = b % chunks * (info.chunk // 4) + offsets.astype(np.int64) // stride
            dense.put((r[:, None, None], quad[:, :, None], np.arange(4)), values)
            at, row = at + raw.size, row + n
    weight, scales = dense.weight.reshape(info.rows, -1), _section(packed, 4, "<f4")[: info.rows, None]
    sums = _section(packed, 5, "<i4")[: info.rows]
    if weight[:, info.cols :].any() or not np.array_equal(weight.sum(1, dtype=np.int64), sums):
        raise ValueError("the sums of the rows are others")
    return np.ascontiguousarray(weight[:, : info.cols]) * scales


def _unpack_nm(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    bits, fields = (2, 16) if info.of == 4 else (3, 10)
    words = 2 if fields % info.keep else 1
    period, groups = words * fields // info.keep, math.ceil(info.cols / info.of)
    size = _values(np.zeros(8, np.uint8), info.value).size
    dense = _Dense((math.ceil(info.rows / 16), 16, groups, info.of))
    stream, at = _section(packed, 0, "u1"), 0
    for first in range(0, info.rows, 16):
        real = np.arange(min(16, info.rows - first))  # rows past the end are zero
        for g in range(0, groups, period):
            n = min(period, groups - g) * info.keep
            word = stream[at : at + words * 64].view("<u4").reshape(words, 1, 16)
            at += words * 64
            column = word >> (np.arange(fields, dtype=np.uint32) * bits)[:, None] & (info.of - 1)
            column = column.reshape(-1, 16)[:n]
            values = _values(stream[at : at + n * 128 // size], info.value).reshape(n, 16)
            at += n * 128 // size
            group = g + np.arange(n)[:, None] // info.keep
            dense.put((first // 16, real, group, column[:, real]), values[:, real])
    scales = _section(packed, 1, "<f4")[: info.rows, None] if info.value == "int8" else np.float32(1)
    weight = dense.weight.reshape(-1, groups * info.of)[: info.rows]
    if weight[:, info.cols :].any():
        raise ValueError("there are weights past the end")
    return np.ascontiguousarray(weight[:, : info.cols]) * scales


def _gelu(y: np.ndarray) -> np.ndarray:
    return 0.5 * y * (1 + np.vectorize(math.erf, otypes=[np.float64])(y / math.sqrt(2)))


_UNPACK = {
    "tiled": _unpack_tiled,
    "block": _unpack_block,
    "bitmask": _unpack_bitmask,
    "quad": _unpack_quad,
    "nm": _unpack_nm,
}
_ACTIVATE = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "gelu": _gelu,
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + np.exp(-y)),
}
