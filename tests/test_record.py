"""Records of models: what is written is read again, and no row of a user's data stays in a model's folder."""

import json

import pytest

from secateur.errors import ModelError
from secateur.record import NAME, read_record, write_record
from secateur.schemas.record import Example, Quality, Record, Units

RECORD = Record(
    title="small",
    quality=Quality(metric="accuracy", dense=0.8, pruned=0.79, drop=0.01, interval=[-0.01, 0.03], rows=100),
    units=[Units(axis="L0.head", kind="head", block=0, kept=6, total=12)],
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(RECORD, tmp_path)
    assert read_record(tmp_path) == RECORD


def test_a_folder_without_a_record_has_none(tmp_path):
    assert read_record(tmp_path) is None


def test_examples_of_the_data_stay_out_of_the_folder(tmp_path):
    example = Example(kind="text", shown="a private sentence", dense="good", pruned="bad")
    write_record(RECORD.model_copy(update={"examples": [example]}), tmp_path)
    assert "private" not in (tmp_path / NAME).read_text()
    assert read_record(tmp_path) == RECORD


def test_a_record_that_claims_more_units_than_there_were_is_refused(tmp_path):
    write_record(RECORD, tmp_path)
    data = json.loads((tmp_path / NAME).read_text())
    data["units"][0]["kept"] = 13
    (tmp_path / NAME).write_text(json.dumps(data))
    with pytest.raises(ModelError, match="keeps 13 of 12"):
        read_record(tmp_path)
