"""What notebooks show: well-formed HTML with the values in it, in which no string of a user is markup."""

from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from secateur.data.table import Table
from secateur.deploy.jobs.results import Bench, Timing
from secateur.layout import Layout
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.metrics.outcome import Outcome
from secateur.notebook import MOST_ROWS, number, table
from secateur.plan import Plan

HOSTILE = '<img src=x onerror="alert(1)"> & </td>'
EVALUATION = Evaluation(task="text-classification", rows=100, metric="accuracy", values={"accuracy": 0.875}, kl=0.01)
DROP = Drop("accuracy", 0.9, 0.875, 0.025, (0.01, 0.04), 100, 0.01, 900)
OUTCOME = Outcome(HOSTILE, EVALUATION, EVALUATION, None, DROP, 1200, 1000, 0.5, 0.0)
BENCH = Bench([Timing(HOSTILE, "onnx", 1, 64, 2.5, 2.25, 2.75, 1.0)], [HOSTILE], 2, {"processor": HOSTILE})
LAYOUT = Layout.from_text(
    "axes\n  L0.head 4 head\n  hidden 6 hidden frozen: it is <fixed>\nparameters\n  w : L0.head hidden"
)


def cells(shown):
    """The text of the cells, row by row; raises where the HTML is not well formed."""
    return [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(shown).iter("tr")]


def notes(shown):
    return ["".join(note.itertext()) for note in ElementTree.fromstring(shown).iter("p")]


def test_a_layout_shows_its_axes_and_why_they_are_frozen():
    shown = LAYOUT._repr_html_()
    assert ["L0.head", "head", "", "", "4"] in cells(shown)
    assert notes(shown) == ["Layout: 2 axes, 1 parameters"]


def test_a_plan_shows_what_it_keeps_of_how_many_and_why():
    plan = Plan({"L0.head": np.array([0, 2])}, {"w": np.eye(2, dtype=bool)}, {"L0.head": 4}, {"criterion": HOSTILE})
    assert cells(plan._repr_html_())[1] == ["L0.head", "2", "4"]
    assert notes(plan._repr_html_())[1:] == [f"criterion: {HOSTILE}", "removes 2 of 4 weights in 1 parameters"]


def test_an_evaluation_and_a_drop_show_their_numbers():
    assert cells(EVALUATION._repr_html_())[1:] == [
        ["accuracy", "0.875"],
        ["loss", "-"],
        ["KL to dense", "0.01"],
        ["flips", "-"],
    ]
    assert cells(DROP._repr_html_())[1] == ["accuracy", "0.9", "0.875", "0.025", "0.01 to 0.04", "100"]
    assert notes(DROP._repr_html_())[1].startswith("the pruned model is worse")


def test_an_outcome_shows_its_stages():
    assert [row[:2] for row in cells(OUTCOME._repr_html_())] == [
        ["model", "accuracy"],
        ["dense", "0.875"],
        ["pruned", "0.875"],
    ]


def test_a_bench_shows_times_and_warnings():
    assert cells(BENCH._repr_html_())[1] == [HOSTILE, "onnx", "1 x 64", "", "2.5", "2.25", "2.75", "1", "0.0"]
    assert notes(BENCH._repr_html_())[1] == HOSTILE


def test_the_points_of_a_search_stand_beside_the_dense_model():
    points = pytest.importorskip("secateur.search.points")
    point = SimpleNamespace(name="2x", speed_up=2.0, drop=DROP, lost=0.025, parameters=(50, 100))
    dense = SimpleNamespace(name="dense", speed_up=None, drop=DROP, lost=0.0, parameters=(100, 100))
    shown = points.Found(None, [point], point, HOSTILE, baselines=[dense])._repr_html_()
    assert cells(shown)[1:] == [
        ["dense", "-", "0.875", "0", "0.01 to 0.04", "100.0%"],
        ["2x (the result)", "2", "0.875", "0.025", "0.01 to 0.04", "50.0%"],
    ]
    assert notes(shown)[1] == HOSTILE


def test_rows_of_data_are_cut_and_counted():
    shown = Table({"text": [HOSTILE * 20] * 60, "image": [b"abc"] * 60, "label": [None] * 60}, HOSTILE)._repr_html_()
    assert len(cells(shown)) == 1 + MOST_ROWS
    text, image, label = cells(shown)[1]
    assert (len(text), image, label) == (200, "3 bytes", "-")
    assert notes(shown) == [f"{HOSTILE}: 60 rows", "10 more rows"]


def test_characters_that_hide_text_are_shown():
    assert cells(table("a", ["\u202eb"], [["c\x1b[2J"]])) == [["\\u202eb"], ["c\\x1b[2J"]]
    assert [number(value) for value in (None, float("nan"), 1234567.0, 0.00012345)] == [
        "-",
        "-",
        "1,234,567",
        "0.0001234",
    ]
