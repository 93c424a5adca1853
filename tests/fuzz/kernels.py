"""Packed weights and tables of steps, whose readers are native: memory ends at a page that nobody may touch.

What the kernels accept must be inside its memory, and every reader of it (each instruction set, the plain reference)
must give the same weight.
"""

import contextlib
import ctypes
import functools
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutate import Case
from tests.fuzz.run import Format

PAGE = mmap.PAGESIZE
SPACE = 64 * PAGE
SHAPES = ((8, 16), (13, 40), (32, 64))
PACKINGS: tuple[dict[str, Any], ...] = (
    {"format": "tiled", "value": "float32", "tile": 16, "chunk": 16},
    {"format": "tiled", "value": "float32", "tile": 32, "chunk": 64},
    {"format": "tiled", "value": "bfloat16", "tile": 16, "chunk": 32},
    *({"format": "block", "value": value, "block": 4} for value in ("float32", "bfloat16", "float16", "int8")),
    {"format": "block", "value": "float32", "block": 8, "chunk": 16},
    *({"format": "bitmask", "value": value} for value in ("float32", "bfloat16", "int8")),
    {"format": "quad", "value": "int8"},
    *({"format": "nm", "value": value, "keep": 2, "of": 4} for value in ("float32", "bfloat16", "float16", "int8")),
    {"format": "nm", "value": "float32", "keep": 1, "of": 4},
    {"format": "nm", "value": "bfloat16", "keep": 4, "of": 8},
)


class Disagreement(Exception):
    """Readers of one packed weight give different numbers. kind: which format, for finds of one cause."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@functools.cache
def _guarded(name: str) -> tuple[np.ndarray, mmap.mmap]:
    """Memory whose end touches a page that may not be read or written."""
    memory = mmap.mmap(-1, SPACE + PAGE)
    array = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(array.ctypes.data + SPACE), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return array[:SPACE], memory


def at_the_end(name: str, data: bytes | np.ndarray, align: int = 8) -> np.ndarray:
    """The bytes at the end of guarded memory, as flat uint8 with an address that is a multiple of `align`.

    AddressSanitizer guards each end of memory of its own, to the byte.
    """
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    if raw.size > SPACE or "SANITIZED_KERNELS" in os.environ:
        return raw.copy()
    begin = (SPACE - raw.size) // align * align
    area = _guarded(name)[0][begin : begin + raw.size]
    area[:] = raw
    return area


def some_weight(shape: tuple[int, int], seed: int, keep: int = 0, of: int = 0) -> np.ndarray:
    """A weight with zeros, in groups where `of` is given."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    if of:
        rank = rng.random((shape[0], -(-shape[1] // of), of)).argsort(-1)
        weight[rank.reshape(shape[0], -1)[:, : shape[1]] >= keep] = 0
    else:
        weight[rng.random(shape) < 0.6] = 0
    return weight


def _blob_seeds() -> Mapping[str, Case]:
    from secateur.kernels.packing import pack

    seeds = {}
    for number, options in enumerate(PACKINGS):
        for shape in SHAPES:
            weight = some_weight(shape, number, options.get("keep", 0), options.get("of", 0))
            name = "-".join([options["format"], options["value"], str(number), f"{shape[0]}x{shape[1]}"])
            seeds[name] = {"weight.packed": pack(weight, **options).tobytes()}
    return seeds


def _read_blob(place: Path) -> Any:
    from secateur.kernels import reference
    from secateur.kernels.format import ROUNDS_ACTIVATIONS, describe
    from secateur.kernels.native import available_isas
    from secateur.kernels.packing import linear, unpack, validate

    path = place / "weight.packed"
    blob = at_the_end("blob", path.read_bytes() if path.is_file() else b"")
    problem: ValueError | None = None
    try:
        validate(blob)
    except ValueError as error:
        problem = error
    # These check only the header, and say so; a caller may skip `validate` for its own weights.
    info = describe(blob)
    if problem is not None:
        _plain(reference.unpack, blob)
        raise problem
    weight = unpack(blob)
    plain = reference.unpack(blob)
    if np.isfinite(plain).all() and not np.array_equal(
        weight, plain
    ):  # zero times a scale of NaN is NaN in one, 0 here
        raise Disagreement(f"{info.format} unpacked", "the plain reference unpacks another weight")
    answers = {}
    rng = np.random.default_rng(0)
    tame = bool(np.isfinite(weight).all()) and float(np.abs(weight).max(initial=0)) < 1e6
    for tokens in (1, 3, 17):
        x = at_the_end("x", rng.standard_normal((tokens, info.cols)).astype(np.float32)).view(np.float32)
        x = x.reshape(tokens, info.cols)
        for isa in available_isas():
            y = linear(blob, x, isa=isa)
            answers[f"{isa} {tokens}"] = y
            if tame and info.format not in ROUNDS_ACTIVATIONS:
                limit = 1e-4 * (1 + np.abs(x) @ np.abs(weight.T))
                if not (np.abs(y - x @ weight.T) <= limit).all():
                    raise Disagreement(
                        f"{info.format} multiplied", f"{isa} computes with another weight for {tokens} tokens"
                    )
    return info, weight, answers


def _plain(function: Any, blob: np.ndarray) -> None:
    """Call the plain reference, which runs where no kernels are compiled, on what they refuse."""
    with contextlib.suppress(ValueError):
        function(blob)


def _chain_parts() -> tuple[list[Any], list[np.ndarray], dict[str, int]]:
    """A block of an encoder: attention over one projection, and two layers with norms; its steps and parts."""
    from secateur.kernels.format import ATTENTION, LINEAR, NORM
    from secateur.kernels.steps import NONE, Op, pack_together

    heads, width, wide = 2, 16, 24
    shapes = [(3 * width, width), (width, width), (wide, width), (width, wide)]
    blobs = pack_together([some_weight(shape, i) for i, shape in enumerate(shapes)], ["float32"] * 4)
    rng = np.random.default_rng(9)
    vectors = [rng.standard_normal(n).astype(np.float32) for n in (48, 16, 16, 16, 24, 16, 16, 16)]
    parts = [*blobs, *vectors]
    steps = [
        Op(LINEAR, [0], weight=0, bias=4),
        Op(ATTENTION, [1, 1, 1], first=(0, width, 2 * width), number=0.35, heads=(heads, heads, width // heads)),
        Op(LINEAR, [2], weight=1, bias=5),
        Op(NORM, [3, 0], scale=6, shift=7, norm=1, number=1e-5),
        Op(LINEAR, [4], weight=2, bias=8, activation=2),
        Op(LINEAR, [5, NONE], weight=3, bias=9),
        Op(NORM, [6, 4], scale=10, shift=11, norm=1, number=1e-5),
    ]
    return steps, parts, {"heads": heads, "width": width, "rows": width}


def _chain_seeds() -> Mapping[str, Case]:
    from secateur.kernels.steps import table

    steps, parts, sizes = _chain_parts()
    rows, numbers = table(steps, lambda index: (index, parts[index].nbytes))
    case = {"steps.table": rows.tobytes(), "numbers.bin": numbers.tobytes(), "sizes.json": json.dumps(sizes).encode()}
    return {"chain": case | {f"part-{i}.bin": part.tobytes() for i, part in enumerate(parts)}}


def _read_chain(place: Path) -> Any:
    from secateur.kernels.format import STEP_FIELDS
    from secateur.kernels.native import load_native
    from secateur.kernels.packing import validate

    native = load_native()
    sizes = json.loads((place / "sizes.json").read_text())
    data = (place / "steps.table").read_bytes() if (place / "steps.table").is_file() else b""
    count = len(data) // 8 // STEP_FIELDS
    if not count or len(data) != count * STEP_FIELDS * 8:
        raise ValueError("the table has not whole rows")
    rows = at_the_end("steps", data).view(np.int64)
    numbers = np.zeros(count, np.float32)
    given = np.frombuffer((place / "numbers.bin").read_bytes(), np.float32)[:count]
    numbers[: given.size] = given
    parts = []
    for i in range(12):
        path = place / f"part-{i}.bin"
        part = at_the_end(f"part {i}", path.read_bytes() if path.is_file() else b"")
        if i < 4:
            validate(part)
        parts.append(part)
    batch, tokens, width = 2, 5, sizes["width"]
    x = np.random.default_rng(1).standard_normal((batch, tokens, width)).astype(np.float32)
    x = at_the_end("x", x).view(np.float32)
    y = at_the_end("y", np.zeros((batch, tokens, sizes["rows"]), np.float32)).view(np.float32)
    native.chain(
        *(
            x.ctypes.data,
            y.ctypes.data,
            batch,
            tokens,
            width,
            sizes["rows"],
            rows.ctypes.data,
            numbers.ctypes.data,
            count,
        ),
        *([p.ctypes.data for p in parts], [p.nbytes for p in parts], sizes["heads"], 0, 0, (0, 0, 0), 1, 0),
    )
    return y.copy()


KERNELS = (
    Format("blobs", _blob_seeds, _read_blob, (ValueError,), light=True, sample=1000),
    Format(
        "chains",
        _chain_seeds,
        _read_chain,
        (ValueError,),
        lambda name: name == "steps.table" or name[:4] == "part",
        light=True,
        sample=300,
    ),
)
