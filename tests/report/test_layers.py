"""Rows of the layer maps: names of blocks and weights, and what the shares are of."""

from secateur.report.layers import matrix_rows, of_the_model, unit_rows
from secateur.schemas.record import Matrix, Units
from tests.report.records import matrices, units


def places(rows):
    return [(row["row"], row["column"]) for row in rows]


def test_units_stand_by_block_and_those_of_the_model_in_a_sentence():
    rows = unit_rows(units())
    assert places(rows)[:3] == [("block 0", "heads"), ("block 0", "FFN neurons"), ("block 1", "heads")]
    assert (rows[-2]["label"], rows[-2]["share"]) == ("0/12", 0.0)
    assert of_the_model(units()) == "Of the whole model: hidden width 384 of 384."
    assert of_the_model([]) == ""


def test_stacks_that_share_block_numbers_are_told_apart():
    found = [Units(axis=f"{stack}.0.head", kind="head", block=0, kept=3, total=4) for stack in ("encoder", "decoder")]
    found.append(Units(axis="decoder.0.cross_head", kind="head", block=0, kept=2, total=4))
    assert places(unit_rows(found)) == [("encoder.0", "heads"), ("decoder.0", "heads"), ("decoder.0", "cross_head")]


def test_weights_are_named_by_as_few_words_as_tell_them_apart():
    rows, what = matrix_rows(matrices())
    assert what == "density"
    assert [column for row, column in places(rows) if row == "block 3"] == [
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    assert len(set(places(rows))) == len(rows) == 72
    assert rows[1]["sizes"] == "384 × 384, dense 384 × 384; density 50%"


def test_weights_without_zeros_show_what_is_left_of_them():
    found = [Matrix(name="m.0.up.weight", block=0, shape=[6, 8], dense_shape=[12, 8], density=1.0)]
    rows, what = matrix_rows(found)
    assert what == "share left"
    assert [(row["row"], row["column"], row["share"]) for row in rows] == [("block 0", "up", 0.5)]
    same = [Matrix(name="m.0.up.weight", block=0, shape=[6, 8], dense_shape=[6, 8], density=1.0)]
    assert matrix_rows(same) == ([], "")
    assert matrix_rows([Matrix(name="w", shape=[2, 2], density=1.0)]) == ([], "")
