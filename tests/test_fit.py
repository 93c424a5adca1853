"""Which criterion scores which units: the page, the help, and what is refused before data is read."""

import re
from pathlib import Path

import numpy as np
import pytest

from secateur import criteria, fit
from secateur.errors import DataError, PlanError
from secateur.pruning import needs_of, prune
from secateur.scores import text_score
from secateur.select import NM, Element, Unit
from secateur.stats import Tally

from .fake import FakeHost

NAMES = [name for name in criteria.__all__ if name != "threshold"]
PAGE = Path(__file__).parents[1] / "docs" / "pruning.md"


def needs(name):
    return needs_of(getattr(criteria, name))


def test_the_table_of_the_page():
    lines = PAGE.read_text().split("| weights, N:M, blocks |", 1)
    columns = [words.strip().split(", ") for words in lines[1].split("\n", 1)[0].strip(" |").split("|")]
    assert sorted(kind for kinds in columns for kind in kinds) == sorted(fit.KINDS)
    rows = re.findall(r"^\| `(\w+)` \|([^`]*?)\|$", lines[1].split("\n\n", 1)[0], re.MULTILINE)
    assert [name for name, _ in rows] == NAMES
    for name, row in rows:
        of_weights, *of_units = [cell.strip() == "x" for cell in row.split("|")]
        try:
            fit.check_pattern(name, needs(name), Element())
        except PlanError:
            assert not of_weights
        else:
            assert of_weights
        for shown, kinds in zip(of_units, columns, strict=True):
            assert {fit.scores(needs(name), kind) for kind in kinds} == {shown}


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("fisher", Unit("ffn", "layer"), "criterion fisher cannot score units of kind 'layer', only head, kv, v, ffn"),
        (
            "attention_mass",
            Unit("ffn"),
            "criterion attention_mass cannot score units of kind 'ffn', only head, kv; use",
        ),
        (
            "routed_saliency",
            Unit("ffn"),
            "criterion routed_saliency cannot score units of kind 'ffn', only expert; use",
        ),
        ("activation", Unit("layers"), "criterion activation cannot score the layer units of layers"),
        ("fisher", NM(2, 4), "criterion fisher scores units, not weights; use a pattern such as head or ffn"),
    ],
)
def test_refused_before_data_is_read(name, pattern, message):
    host = FakeHost()
    with pytest.raises(PlanError, match=message):
        prune(host, getattr(criteria, name), pattern, 0.5, data=[1])
    assert host.collected == []


def test_statistics_that_are_given_count():
    host = FakeHost()
    tally = Tally()
    tally.add("attn_mass", "L0.ffn", np.arange(host.layout.axis("L0.ffn").size, dtype=float), 1.0)
    with pytest.raises(PlanError, match="cannot score units of kind 'ffn'"):
        prune(host, criteria.attention_mass, Unit("ffn"), 0.5, stats=tally.stats())
    assert len(prune(host, criteria.attention_mass, Unit("L0.ffn"), 0.5, stats=tally.stats()).keep["L0.ffn"]) == 4


def test_units_whose_weights_were_not_seen_are_not_ranked_by_position():
    host = FakeHost()
    tally = Tally()
    tally.add("act_sq", "somewhere.else", np.ones(3), 1.0)
    with pytest.raises(DataError, match="no act_sq was collected for the weights of L0.ffn; use magnitude or taylor"):
        prune(host, criteria.wanda, Unit("ffn"), 0.5, stats=tally.stats())


def test_collapse_is_judged_beside_the_dense_model():
    tokens = np.array([[0, 1, 2], [0, 2, 1]])  # a table of tokens has a loss of log 2 = 0.69
    losses = np.array([2.0, 3.0])
    assert "predicts worse" in text_score(losses, tokens).collapsed
    assert "predicts worse" in text_score(losses, tokens, np.array([0.1, 0.2])).collapsed
    assert text_score(losses, tokens, losses).collapsed is None
    assert text_score(losses, tokens, losses - 0.6).collapsed is None
    message = text_score(losses, tokens, losses - 0.8).collapsed
    assert message == "its perplexity (12.2) is more than 2 times that of the dense model (5.5)"
