"""`journal.json`: what a long run has finished, from which it is continued."""

from typing import Annotated, Any

from pydantic import Field

from secateur.schemas.reading import Schema

File = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The name of a file in the folder of the results."""
State = Annotated[str, Field(pattern=r"^\w+-[0-9]+-[0-9]+$")]
"""A stream, a step and a batch: the name of a file without its ending."""
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
"""A loss or an error before and after."""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Layer(Schema):
    """The record of one weight: see `secateur.torch.blockwise.prune_block.Pruned`."""

    name: str
    weights: Count
    zeros: Count
    error: float | None
    notes: list[str]


class Block(Schema):
    """The record of a finished block. error, tuned: see `secateur.torch.blockwise.walk.Done`."""

    path: str
    file: File
    error: float | None
    tuned: Pair | None
    layers: list[Layer]
    sha256: str
    seconds: float


class Settings(Schema):
    """What a run chose at its start, the sparsity of each weight once that is known, and the seconds that statistics
    have taken."""

    batch: Positive
    on_disk: bool
    expected: int
    threads: Positive
    bfloat16: bool
    sparsity: dict[str, float] | None = None
    seconds: float | None = None


class Unset(Schema):
    """The settings of a run that had not begun."""


class JournalFile(Schema):
    """The state of a run: see `secateur.torch.stream.journal.Journal`."""

    format: Annotated[int, Field(ge=1, le=1)]
    identity: dict[str, Any]
    settings: Settings | Unset = Field(default_factory=Unset)
    blocks: list[Block] = Field(default_factory=list)
    states: dict[State, Annotated[list[Any], Field(min_length=2, max_length=2)]] = Field(default_factory=dict)
    distilled: Pair | None = None
    finished: bool = False
