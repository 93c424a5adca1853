"""What was measured, as files: `results.json` and `kit.json` of an export kit, and latency tables in the cache."""

import math
from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from secateur.schemas.reading import Schema

MOST_TIME = 1e12
"""Bound of times and of their changes, in the unit of the file: sums of them stay finite."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Time = Annotated[float, Field(gt=0, lt=MOST_TIME, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Change = Annotated[float, Field(gt=-MOST_TIME, lt=MOST_TIME, allow_inf_nan=False)]


class Row(Schema):
    """One model on one runtime at one shape: times, or an error. length: 0 for a model that takes no tokens."""

    model: str
    runtime: str
    batch: Positive
    length: Count
    median_ms: Time = math.nan
    low_ms: Time = math.nan
    high_ms: Time = math.nan
    startup_s: Time = math.nan
    peak_bytes: Count = 0
    error: str = ""

    @model_validator(mode="after")
    def _times_or_an_error(self) -> "Row":
        if not self.error and not self.low_ms <= self.median_ms <= self.high_ms:
            raise ValueError("a row has an error, or low_ms, median_ms and high_ms, in this order")
        return self


class Machine(Schema):
    """The machine that was measured on."""

    processor: str = ""
    cores: Positive | None = None
    system: str = ""
    python: str = ""


class Results(Schema):
    """`results.json`."""

    format: int
    kit: str
    threads: Positive
    machine: Machine
    rows: list[Row]


class Sizes(Schema):
    """What an artefact in a kit weighs."""

    bytes: Count
    zeros: Share
    sparse: bool = False


class Kit(Schema):
    """`kit.json`. sizes: runtime -> model -> what it weighs. runtimes: runtime -> model -> its folder. files: the
    SHA-256 of each file of the artefacts by its path."""

    id: str
    sizes: dict[str, dict[str, Sizes]]
    batch: list[Positive] = Field(default_factory=list)
    length: list[Positive] = Field(default_factory=list)
    threads: Positive = 1
    turns: Positive = 1
    runtimes: dict[str, dict[str, str]] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    library: str | None = None


class Curve(Schema):
    """One curve of a latency table."""

    sizes: Annotated[list[Positive], Field(min_length=1)]
    changes: list[Change]

    @model_validator(mode="after")
    def _one_change_a_size(self) -> "Curve":
        if len(self.sizes) != len(self.changes):
            raise ValueError(f"{len(self.sizes)} sizes have {len(self.changes)} changes")
        if any(first >= second for first, second in pairwise(self.sizes)):
            raise ValueError("sizes are ascending")
        return self


class Table(Schema):
    """A latency table; `secateur.cost.LatencyTable` says what its parts are."""

    runtime: str
    batch: Positive
    length: Positive
    threads: Positive
    dense_ms: Time
    curves: dict[str, Curve]
    axes: dict[str, str]
    together: Change = 0.0
    layers: dict[str, Change] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _every_axis_has_a_curve(self) -> "Table":
        lacking = next((curve for curve in self.axes.values() if curve not in self.curves), None)
        if lacking is not None:
            raise ValueError(f"there is no curve {lacking!r}")
        unused = next((curve for curve in self.curves if curve not in self.axes.values()), None)
        if unused is not None:
            raise ValueError(f"no axis has the curve {unused!r}")
        return self


class SparseTable(Schema):
    """Times on the sparse kernels; `secateur.search.sparse.times.SparseTimes` says what its parts are."""

    dense_ms: Time
    fixed: Change
    per_unit: dict[str, Change]
    per_break: Change
    per_weight: Time
    names: list[str]
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
