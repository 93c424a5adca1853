"""`secateur-hashes.json`, in every model folder that secateur saves: the SHA-256 of the other files but `README.md`."""

from typing import Annotated

from pydantic import Field

from secateur.schemas.reading import Schema


class Hashes(Schema):
    """What the files of a folder were when it was saved.

    sha256: file, by its path inside the folder with `/` -> 64 hexadecimal digits.
    """

    format: Annotated[int, Field(ge=1, le=1)]
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
