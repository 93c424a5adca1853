"""`secateur-levels.json`: the order in which the units of each axis go, and the expected divergence at each size."""

from typing import Annotated

from pydantic import Field

from secateur.schemas.reading import Schema

Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float, Field(ge=0)] | None
"""None where the model cannot run with so few units."""


class OneAxis(Schema):
    """One axis. order: its units, each once. losses: when the first k of them are gone, one more than units.

    weight, bias: what makes up for the units that go.
    """

    kind: str
    order: list[Count]
    losses: list[Loss]
    weight: str | None
    bias: str | None


class LevelsFile(Schema):
    """Levels of a model. layers: axis of layers -> divergence without each. notes: axes that stay whole, and why."""

    format: Annotated[int, Field(ge=1, le=1)]
    method: str
    axes: dict[str, OneAxis]
    layers: dict[str, list[float]]
    notes: dict[str, str]
