"""`secateur.json`, beside the weights of a plain module: how it differs from the module that its class builds."""

from typing import Annotated, Any

from pydantic import Field

from secateur.schemas.reading import Schema


class PlainManifest(Schema):
    """The manifest of a plain module.

    packed: whether the weight file holds packed tensors.
    tied: name of a tensor -> the name under which the file holds it.
    changes: read by `secateur.torch.base.manifest.Changes.from_json`.
    checksum: of the changes; manifests of before have none.
    """

    format: Annotated[int, Field(ge=1, le=1)]
    packed: bool = False
    tied: dict[str, str] = Field(default_factory=dict)
    changes: dict[str, Any] = Field(default_factory=dict)
    checksum: str | None = None
