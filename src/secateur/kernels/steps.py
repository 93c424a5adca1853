"""The steps of a chain of layers or of a decoder's block, and the table that the kernels read them from: see sct_chain
and sct_token in native/include/secateur/kernels.h, and the fields of a row in native/include/secateur/steps.h.

Value 0 is the input; step i writes value i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.kernels.format import ATTENTION, NORM
from secateur.kernels.native import isa
from secateur.kernels.packing import chain_defaults, pack, row_block_for

NONE = -1
"""The number of a value, or the index of a part, that does not exist."""


@dataclass
class Op:
    """One step. Field names are keys of runtime.json in saved folders.

    - `kind`: LINEAR, NORM, ATTENTION, ROTARY or GATE
    - `reads`: the numbers of the values that the step reads
    - `first`: the rows where queries, keys and values begin in the values read (attention)
    - `weight`, `bias`, `scale`, `shift`: arrays, or what stands for them (paths in a program); None where there is none
    - `value`: the type that the weight is stored in
    - `activation`, `norm`: indices into `ACTIVATIONS` and `NORMS`
    - `number`: the epsilon of a norm, or the factor of attention scores
    - `heads`: (query heads, key/value heads, width of a head)
    - `rows`: the outputs of a linear layer that is computed elsewhere and has no weight here
    """

    kind: int
    reads: list[int]
    first: tuple[int, int, int] = (0, 0, 0)
    weight: Any = None
    value: str = "float32"
    bias: Any = None
    scale: Any = None
    shift: Any = None
    activation: int = 0
    norm: int = 0
    number: float = 0.0
    heads: tuple[int, int, int] = (0, 0, 0)
    rows: int = 0


def step_from_json(data: Mapping[str, Any]) -> Op:
    """Read a step that `dataclasses.asdict` has written."""
    return Op(**{**data, "first": tuple(data["first"]), "heads": tuple(data["heads"])})


def three_reads(step: Op) -> list[int]:
    """The values that a step reads, filled up with NONE."""
    return [*step.reads, NONE, NONE][:3]


def rows_written(step: Op, rows: Sequence[int], layer: tuple[int, int] | None) -> int:
    """The numbers of a token that a step writes.

    Args:
        step: a step.
        rows: the numbers of a token in the values before it.
        layer: (out, in) of the layer of a linear step.

    Raises:
        ValueError: when the step reads a value that does not exist yet, or one of another width than its layer's.
    """
    if (
        not 1 <= len(step.reads) <= 3
        or not step.reads[0] >= 0
        or not NONE <= min(step.reads) <= max(step.reads) < len(rows)
    ):
        raise ValueError(f"step {len(rows) - 1} reads the values {step.reads}, but there are {len(rows)} before it")
    if layer is not None and layer[1] != rows[step.reads[0]]:
        raise ValueError(f"step {len(rows) - 1} has a layer for {layer[1]} numbers, but reads {rows[step.reads[0]]}")
    if layer is not None:
        return layer[0]
    return step.heads[0] * step.heads[2] if step.kind == ATTENTION else rows[step.reads[0]]


def vector_length(step: Op, rows: int) -> int:
    """The numbers in the bias, scale and shift of a step that writes so many rows: a norm of heads has those of one."""
    return step.heads[2] if step.kind == NORM and step.heads[0] else rows


def pack_together(weights: Sequence[np.ndarray], values: Sequence[str]) -> list[np.ndarray]:
    """The weights (out, in) of a chain, packed for one tile that suits them all."""
    density = sum(np.count_nonzero(weight) for weight in weights) / sum(weight.size for weight in weights)
    tile, chunk = chain_defaults(isa(), density)

    def packed(weight: np.ndarray, value: str) -> np.ndarray:
        block = row_block_for(len(weight), tile, threads=1)
        return pack(weight, format="tiled", value=value, tile=tile, chunk=chunk, row_block=block)

    return [packed(weight, value) for weight, value in zip(weights, values, strict=True)]


def table(steps: Sequence[Op], locate: Callable[[Any], tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the steps (count, STEP_FIELDS) and the `number` of each step (count).

    `locate` gives the index and the bytes of a weight, bias, scale or shift. It is called in this order for each step.
    """
    rows = []
    for step in steps:
        weight = (NONE, step.rows) if step.weight is None else locate(step.weight)
        vectors = [NONE if part is None else locate(part)[0] for part in (step.bias, step.scale, step.shift)]
        rows.append(
            [step.kind, *three_reads(step), *step.first, *weight, *vectors, step.activation, step.norm, *step.heads]
        )
    return np.array(rows, np.int64), np.array([step.number for step in steps], np.float32)
