"""The record of a model as a file in its folder: written with the model, read by reports and model cards."""

from pathlib import Path

from secateur.card.write import write_card
from secateur.errors import ModelError
from secateur.files import write_json
from secateur.schemas.reading import read
from secateur.schemas.record import Record

NAME = "secateur-record.json"


def write_record(record: Record, folder: Path) -> None:
    """Write the record into the folder, without its examples, which are rows of the user's data, and the model card
    that is made from it (see `secateur.card.write`).
    """
    kept = record.model_copy(update={"examples": []})
    write_json(folder / NAME, kept.model_dump(mode="json", exclude_defaults=True) | {"format": record.format})
    write_card(kept, folder)


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None where there is none. Raises ModelError for a damaged one."""
    path = folder / NAME
    if not path.is_file():
        return None
    return read(path, Record, error=ModelError, remedy="delete the file, or prune the model again")
