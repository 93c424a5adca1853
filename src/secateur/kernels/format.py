"""The numbers and limits that the kernels, packed weights and step tables share, and the header of a packed weight.

Names stand in the order of their numbers in native/include/secateur/kernels.h; tests/kernels/test_enums.py compares the
two. The layout of a packed weight is described in native/src/blob.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORMATS = ("tiled", "block", "bitmask", "quad", "nm")
"""Numbered from 1, unlike all other names here."""
VALUES = ("float32", "bfloat16", "float16", "int8")
"""The types of stored weights; int8 is symmetric with one scale a row."""
VALUES_OF = {
    "tiled": VALUES[:2],
    "block": VALUES,
    "bitmask": ("float32", "bfloat16", "int8"),
    "quad": ("int8",),
    "nm": VALUES,
}
"""The value types that each format stores."""
ROUNDS_ACTIVATIONS = ("quad",)
"""The formats that round activations to 8 bits at each call."""
ACTIVATION_TYPES = ("float32", "int8")
"""The types that a layer may round its inputs to."""
BLOCKS = (4, 8)
"""Rows of a block in the block format."""
GROUPS = ((1, 4), (2, 4), (4, 8))
"""(keep, of) of the nm format: at most `keep` of `of` consecutive weights of a row are nonzero."""
QUAD = 4
"""Columns of a block in the quad format (1x4 blocks for int8 dot products of four)."""
MAX_QUAD_COLUMNS = 65536
"""Up to this width the quad format's sums of uint8 times int8 stay below 2^31."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
NORMS = ("none", "layer_norm", "rms_norm")
NO_NORM, LAYER_NORM, RMS_NORM = range(3)

STEP_KINDS = ("linear", "norm", "attention", "rotary", "gate")
LINEAR, NORM, ATTENTION, ROTARY, GATE = range(5)
"""Kinds of steps. Chains know the first three. Decoder steps also know ROTARY (rotary position embedding of heads) and
GATE (the product of two values)."""
STEP_FIELDS = 17
"""Numbers in a row of a step table: see native/include/secateur/steps.h."""

MAGIC = b"SECPACK1"
HEADER_BYTES = 128
TILED_LAYOUT = 3
"""The version of the tiled layout that this secateur reads."""
DAMAGED = "this is not a packed weight, or it is damaged; pack the weight again"


@dataclass(frozen=True)
class PackedInfo:
    """The header of a packed weight; parameters that the format does not have are 0.

    - `format`: one of `FORMATS`
    - `value`: the type of the stored weights, one of `VALUES`
    - `rows`, `cols`: the shape of the weight (out, in)
    - `nonzeros`: stored weights that are not zero
    - `tile`: tokens that are worked on side by side (tiled, quad)
    - `chunk`: columns that are worked on at a time (tiled, quad, block)
    - `row_block`: rows that are worked on at a time (tiled, quad, block)
    - `block`: rows of a block (block)
    - `keep`, `of`: at most `keep` of `of` consecutive weights are nonzero (nm)
    """

    format: str
    value: str
    rows: int
    cols: int
    nonzeros: int
    tile: int = 0
    chunk: int = 0
    row_block: int = 0
    block: int = 0
    keep: int = 0
    of: int = 0


def describe(packed: np.ndarray) -> PackedInfo:
    """Read the header of a packed weight.

    Raises:
        ValueError: when `packed` is not a packed weight, is damaged, or has the tiled layout of another version.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size < HEADER_BYTES:
        raise ValueError(
            f"a packed weight is a flat uint8 array of at least {HEADER_BYTES} bytes, not {packed.dtype} {packed.shape}"
        )
    if not packed.flags.c_contiguous:
        raise ValueError("a packed weight is contiguous in memory; copy it with numpy.ascontiguousarray")
    head = packed[:HEADER_BYTES].tobytes()
    format_code, value_code, rows, cols = np.frombuffer(head, "<u4", 4, 8).tolist()
    nonzeros, size = np.frombuffer(head, "<u8", 2, 24).tolist()
    parameters = np.frombuffer(head, "<u4", 4, 40).tolist()
    if head[:8] != MAGIC or size != packed.size or not rows or not cols or nonzeros > rows * cols:
        raise ValueError(DAMAGED)
    if not 1 <= format_code <= len(FORMATS) or value_code >= len(VALUES):
        raise ValueError(DAMAGED)
    name, value = FORMATS[format_code - 1], VALUES[value_code]
    if value not in VALUES_OF[name]:
        raise ValueError(DAMAGED)
    return PackedInfo(name, value, rows, cols, nonzeros, **_parameters(name, parameters))


def _parameters(name: str, numbers: list[int]) -> dict[str, int]:
    """The parameters of a format by name, from the four numbers in the header."""
    if name == "tiled" and numbers[3] != TILED_LAYOUT:
        raise ValueError("this packed weight was written by another version of secateur; pack the weight again")
    if name in ("tiled", "quad", "block") and not all(numbers[:3]):
        raise ValueError(DAMAGED)
    if name == "nm":
        if (numbers[0], numbers[1]) not in GROUPS:
            raise ValueError(DAMAGED)
        return {"keep": numbers[0], "of": numbers[1]}
    return {"block" if name == "block" else "tile": numbers[0], "chunk": numbers[1], "row_block": numbers[2]}


def check_activations(value: str, activations: str) -> None:
    """Check the type that inputs may be rounded to against the type of the weights.

    Raises:
        ValueError: for a type of activations that is unknown or does not go with the type of the weights.
    """
    if activations not in ACTIVATION_TYPES:
        raise ValueError(f"activations must be one of {', '.join(map(repr, ACTIVATION_TYPES))}, not {activations!r}")
    if activations == "int8" and value != "int8":
        raise ValueError(f"activations='int8' goes with value='int8', not {value!r}; pass both")
