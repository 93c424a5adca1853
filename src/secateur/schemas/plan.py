"""`plan.json`: which units stay, the shapes of the masks, and the names of the weights that repair has changed."""

from typing import Annotated, Any

from pydantic import Field

from secateur.schemas.reading import Schema

Count = Annotated[int, Field(ge=0)]


class Kept(Schema):
    """The kept units of one axis, each once. of: how many units it had."""

    of: Count
    units: list[Count]


class PlanFile(Schema):
    """A plan. provenance: whatever explains the decision. masks: parameter -> shape, of at most 64 dimensions."""

    format: Annotated[int, Field(ge=1, le=1)]
    keep: dict[str, Kept]
    masks: dict[str, Annotated[list[Count], Field(max_length=64)]]
    provenance: dict[str, Any] = Field(default_factory=dict)
    weights: list[str] = Field(default_factory=list)
