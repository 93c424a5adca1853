"""Reads packed weights in plain numpy: the slow path where no kernels are compiled, and the reference that the kernels
are tested against. native/src/blob.h describes the layout.
"""

from __future__ import annotations

import math

import numpy as np

from secateur.kernels.format import HEADER_BYTES, PackedInfo, describe


def unpack(packed: np.ndarray) -> np.ndarray:
    """The dense float32 weight (rows, cols)."""
    info = describe(packed)
    try:
        return _UNPACK[info.format](packed, info)
    except IndexError as error:
        raise ValueError("a packed weight is damaged; pack the weight again") from error


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
    weight = np.zeros((info.rows, info.cols), np.float32)
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
                    weight[r[:, None], seen + offsets.astype(np.int64) // stride] = values
            at, row = at + raw.size, row + n * together
    return weight


def _scales(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    """(rows, 1), for int8; ones otherwise."""
    if info.value != "int8":
        return np.ones((info.rows, 1), np.float32)
    return _section(packed, 3, "<f4")[: info.rows, None]


def _unpack_block(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    weight = np.zeros((math.ceil(info.rows / info.block) * info.block, info.cols), np.float32)
    starts, columns = _section(packed, 0, "<u4"), _section(packed, 1, "<u2")
    values = _values(_section(packed, 2, "u1"), info.value)
    i = 0
    for row in range(0, info.rows, info.row_block):
        for col in range(0, info.cols, info.chunk):
            for group in range(row, min(row + info.row_block, info.rows), info.block):
                begin, end = int(starts[i]), int(starts[i + 1])
                kept = values[begin * info.block : end * info.block].reshape(end - begin, info.block)
                weight[group : group + info.block, col + columns[begin:end].astype(np.int64)] = kept.T
                i += 1
    return weight[: info.rows] * _scales(packed, info)


def _unpack_bitmask(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    words = math.ceil(info.cols / 64)
    masks = _section(packed, 1, "u1")[: info.rows * words * 8].reshape(info.rows, words * 8)
    kept = np.unpackbits(masks, axis=1, bitorder="little")[:, : info.cols].astype(bool)
    weight = np.zeros((info.rows, info.cols), np.float32)
    weight[kept] = _values(_section(packed, 2, "u1"), info.value)[: kept.sum()]
    return weight * _scales(packed, info)


def _unpack_quad(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    weight = np.zeros((info.rows, math.ceil(info.cols / 4), 4), np.float32)
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
            weight[r[:, None], b % chunks * (info.chunk // 4) + offsets.astype(np.int64) // stride] = values
            at, row = at + raw.size, row + n
    scales = _section(packed, 4, "<f4")[: info.rows, None]
    return np.ascontiguousarray(weight.reshape(info.rows, -1)[:, : info.cols]) * scales


def _unpack_nm(packed: np.ndarray, info: PackedInfo) -> np.ndarray:
    bits, fields = (2, 16) if info.of == 4 else (3, 10)
    words = 2 if fields % info.keep else 1
    period, groups = words * fields // info.keep, math.ceil(info.cols / info.of)
    size = _values(np.zeros(8, np.uint8), info.value).size
    weight = np.zeros((math.ceil(info.rows / 16), 16, groups, info.of), np.float32)
    stream, at = _section(packed, 0, "u1"), 0
    for sixteen in weight:
        for g in range(0, groups, period):
            n = min(period, groups - g) * info.keep
            word = stream[at : at + words * 64].view("<u4").reshape(words, 1, 16)
            at += words * 64
            column = word >> (np.arange(fields, dtype=np.uint32) * bits)[:, None] & (info.of - 1)
            column = column.reshape(-1, 16)[:n]
            values = _values(stream[at : at + n * 128 // size], info.value).reshape(n, 16)
            at += n * 128 // size
            group = g + np.arange(n)[:, None] // info.keep
            sixteen[np.arange(16), group, column] = values
    scales = _section(packed, 1, "<f4")[: info.rows, None] if info.value == "int8" else np.float32(1)
    return np.ascontiguousarray(weight.reshape(-1, groups * info.of)[: info.rows, : info.cols]) * scales


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
