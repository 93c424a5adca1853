"""What the parts of a report say."""

import pytest

from secateur.report import parts
from secateur.schemas.record import Form, Record, Sizes


@pytest.mark.parametrize(
    ("nonzero", "parameters", "label", "value"),
    [(60, 100, "Not zero", "60%"), (100, 100, "Size", "100%"), (60, 80, "Size", "80%"), (0, 100, "Not zero", "0%")],
)
def test_the_big_number_of_a_model_with_zeros_is_what_is_not_zero(nonzero, parameters, label, value):
    sizes = Sizes(parameters=parameters, dense_parameters=100, nonzero=nonzero)
    (tile,) = parts.of_record(Record(title="x", sizes=sizes), 0).tiles
    assert (tile.label, tile.value) == (label, value)


def test_a_language_model_at_fewer_bits_has_a_table():
    forms = [
        Form(name="dense q8_0", bytes=143_000_000, value=3.0102, drop=0.0002, interval=[-0.001, 0.0014], flips=0.01),
        Form(name="dense float32", bytes=538_000_000, value=3.01),
    ]
    found = parts.of_record(Record(title="x", forms=forms), 0).forms
    assert found.columns == ("weights", "size", "loss for a token", "more than dense", "answers that changed")
    first, second = found.rows
    assert [cell.text for cell in first] == ["dense q8_0", "143 MB", "3.0102", "+0.0002", "1%"]
    assert first[3].note == "\N{MINUS SIGN}0.0010 to +0.0014"
    assert second[3].text == "–"
    assert parts.of_record(Record(title="x"), 0).forms is None
