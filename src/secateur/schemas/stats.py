"""What a file of statistics holds beside its sums, in the header of the safetensors file."""

from typing import Annotated

from pydantic import Field

from secateur.schemas.reading import Schema

Amount = Annotated[float, Field(ge=0)]


class StatsNotes(Schema):
    """counts: quantity -> parameter or axis -> number of items in the sum. notes: what the sums were made from."""

    format: Annotated[int, Field(ge=1, le=1)]
    counts: dict[str, dict[str, Amount]]
    notes: dict[str, str] = Field(default_factory=dict)
