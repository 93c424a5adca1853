"""What is read of a Hugging Face model folder: keys of `config.json`, the schedule of tokens in its manifest, and the
index of its weight files.
"""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from secateur.errors import ModelError, shown
from secateur.schemas.reading import Schema, check, read_json

REMEDY = "save or copy the model again"
LONGEST_NAME = 255
"""Bytes of the longest name of a file that file systems take."""


class Known(Schema):
    """Keys that we use, among others that belong to transformers."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Config(Known):
    """`config.json`. architectures: the classes of the model, of which the first one counts."""

    architectures: list[str] | None = None


class WeightIndex(Known):
    """`model.safetensors.index.json`. weight_map: tensor -> the file, beside the index, that holds it."""

    weight_map: dict[str, str] = Field(default_factory=dict)


class TokensEntry(Schema):
    """`quantization_config.tokens` in `config.json`, of a model that runs with a schedule of tokens.

    schedule: read by `secateur.token_schedule.TokenSchedule.from_json`.
    sites: read by `secateur.torch.tokens.sites.TokenSites.from_json`.
    """

    schedule: dict[str, Any]
    sites: dict[str, Any]


def read_config(path: Path) -> dict[str, Any]:
    """All of a `config.json`, infinite numbers included; ModelError when it is damaged."""
    values = read_json(path, remedy=REMEDY, infinite=True)
    check(values, Config, str(path), remedy=REMEDY)
    return values


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index; ModelError when it is damaged, or names a file outside its own folder."""
    weights = check(read_json(path, remedy=REMEDY), WeightIndex, str(path), remedy=REMEDY).weight_map
    if not weights:
        raise ModelError(f"{path} lists no weights; {REMEDY}")
    for name in dict.fromkeys(weights.values()):
        if len(name.encode(errors="replace")) > LONGEST_NAME:
            raise ModelError(f"{path} names a file of more than {LONGEST_NAME} bytes, {shown(name, 60)}; {REMEDY}")
        if name != Path(name).name or name in ("", "..") or not name.isprintable():
            raise ModelError(f"{path} points outside its folder, to {name!r}; it is not to be trusted")
    return weights
