"""What the parts of a report say."""

import pytest

from secateur.report import parts
from secateur.schemas.record import Record, Sizes


@pytest.mark.parametrize(
    ("nonzero", "parameters", "label", "value"),
    [(60, 100, "Not zero", "60%"), (100, 100, "Size", "100%"), (60, 80, "Size", "80%"), (0, 100, "Not zero", "0%")],
)
def test_the_big_number_of_a_model_with_zeros_is_what_is_not_zero(nonzero, parameters, label, value):
    sizes = Sizes(parameters=parameters, dense_parameters=100, nonzero=nonzero)
    (tile,) = parts.of_record(Record(title="x", sizes=sizes), 0).tiles
    assert (tile.label, tile.value) == (label, value)
