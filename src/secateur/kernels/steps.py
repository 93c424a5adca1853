"""What a chain of layers consists of, step by step, and the table that the kernels read it from: see sct_chain in
native/include/secateur/kernels.h and the fields of a row in native/include/secateur/steps.h.

Value 0 is what a chain reads; step i writes value i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.kernels.native import isa
from secateur.kernels.packing import chain_defaults, pack, row_block_for

LINEAR, NORM, ATTENTION = range(3)
"""Kinds of steps, by their numbers in native/include/secateur/kernels.h."""
ROTARY, GATE = 3, 4
"""Kinds that decoders have besides, a token at a time, and chains do not: heads turned by their positions, and the
product of two values."""
NONE = -1
"""The number of a value or part that is not there."""
FIELDS = 17
"""Of a row of the table."""


@dataclass
class Op:
    """One step: the values that it reads, and what it holds. `weight`, `bias`, `scale` and `shift` are arrays, or what
    stands for them where the chain is kept (None: there is none). `number` is a norm's epsilon or what attention
    multiplies scores by; `first` are the rows where q, k and v begin, `heads` (heads, kv heads, width of one),
    `rows` the outputs of a layer that is computed elsewhere and has no weight here.
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
    """A step from what `dataclasses.asdict` made of it."""
    return Op(**{**data, "first": tuple(data["first"]), "heads": tuple(data["heads"])})


def three_reads(step: Op) -> list[int]:
    """The values that a step reads, filled up with NONE."""
    return [*step.reads, NONE, NONE][:3]


def pack_together(weights: Sequence[np.ndarray], values: Sequence[str]) -> list[np.ndarray]:
    """The weights (out, in) of a chain, packed for one tile that suits them all."""
    density = sum(np.count_nonzero(weight) for weight in weights) / sum(weight.size for weight in weights)
    tile, chunk = chain_defaults(isa(), density)

    def packed(weight: np.ndarray, value: str) -> np.ndarray:
        block = row_block_for(len(weight), tile, threads=1)
        return pack(weight, format="tiled", value=value, tile=tile, chunk=chunk, row_block=block)

    return [packed(weight, value) for weight, value in zip(weights, values, strict=True)]


def table(steps: Sequence[Op], place: Callable[[Any], tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the steps (count, fields) and their numbers (count); `place` gives the place and the bytes of a
    weight, bias, scale or shift, in this order for each step.
    """
    rows = []
    for step in steps:
        weight = (NONE, step.rows) if step.weight is None else place(step.weight)
        others = [NONE if part is None else place(part)[0] for part in (step.bias, step.scale, step.shift)]
        rows.append(
            [step.kind, *three_reads(step), *step.first, *weight, *others, step.activation, step.norm, *step.heads]
        )
    return np.array(rows, np.int64), np.array([step.number for step in steps], np.float32)
