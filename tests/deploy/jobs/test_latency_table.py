"""Latency tables: curves by hand, groups of axes, and a table from made-up ratios."""

import json

import pytest

import secateur
from secateur.cost import Curve, LatencyTable
from secateur.deploy.jobs import latency_table
from secateur.errors import PlanError


def test_curves_are_linear_between_sizes():
    curve = Curve((2, 4, 8), (-0.3, -0.2, 0.0))
    assert curve.at(8) == 0.0
    assert curve.at(4) == pytest.approx(-0.2)
    assert curve.at(6) == pytest.approx(-0.1)
    assert curve.at(1) == pytest.approx(-0.35)


def test_a_prediction_adds_up_blocks():
    curves = {"head": Curve((1, 4), (-0.1, 0.0)), "ffn": Curve((10, 20), (-0.2, 0.0))}
    axes = {"L0.head": "head", "L1.head": "head", "L0.ffn": "ffn"}
    found = LatencyTable("torch", 8, 64, 1, 50.0, curves, axes, layers={"layers": -0.25})
    assert found.predict({}) == 50.0
    assert found.share({"L0.head": 1, "L1.head": 4, "L0.ffn": 15}) == pytest.approx(1 - 0.1 - 0.1)
    assert found.predict({"L0.ffn": 10}) == pytest.approx(40.0)
    assert found.share({"L0.head": 1}, {"layers": 1}) == pytest.approx(1 - 0.1 - 0.25)
    assert LatencyTable.from_json(found.as_json()) == found
    with pytest.raises(PlanError, match=r"no axis 'L9\.head'; it has L0\.head, L1\.head, L0\.ffn, layers"):
        found.predict({"L9.head": 1})
    with pytest.raises(PlanError, match="no axis 'blocks'; it has"):
        found.share({}, {"blocks": 1})


def test_equal_axes_share_a_curve(classifier):
    layout = secateur.open(classifier).layout
    groups = latency_table.groups_of(layout)
    assert sorted(len(axes) for axes in groups.values()) == [2, 2]
    assert latency_table.grid(12, 4) == [3, 6, 9]
    assert latency_table.grid(2, 5) == [1]
    assert latency_table.grid(1536, 5) == [304, 608, 928, 1232]
    assert latency_table.grid(1536, 5, step=1) == [307, 614, 922, 1229]
    wanted = latency_table.wanted(layout, 2)
    assert wanted["dense"] == {}
    assert sorted(tuple(sizes.values()) for sizes in wanted.values()) == [(), (1,), (2, 2), (2, 2, 32, 32), (32, 32)]


def test_a_table_from_ratios(classifier):
    layout = secateur.open(classifier).layout
    ratios = {name: 0.8 if name.startswith("head") else 0.6 for name in latency_table.wanted(layout, 2)}
    ratios[latency_table.TOGETHER] = 0.34
    found = latency_table.assemble(layout, "torch", (8, 64), 1, 2, ratios, 10.0)
    heads, ffn = layout.of_kind("head"), layout.of_kind("ffn")
    assert found.share({heads[0].name: 2}) == pytest.approx(0.9)
    assert found.together == pytest.approx(-0.06)
    assert found.share({a.name: 2 for a in heads} | {a.name: 32 for a in ffn}) == pytest.approx(0.34)
    assert found.share({heads[0].name: 2, ffn[0].name: 32}) == pytest.approx(0.9 - 0.2 - 0.06 / 4)
    assert found.share({ffn[1].name: 48}) == pytest.approx(0.9)
    (layers,) = layout.of_kind("layer")
    assert found.layers == {layers.name: pytest.approx(-0.4)}


DAMAGES = [
    {"dense_ms": -1.0},
    {"dense_ms": "10"},
    {"curves": {}},
    {"curves": {"head": {"sizes": [4, 2], "changes": [-0.1, 0.0]}}},
    {"curves": {"head": {"sizes": [2], "changes": [-0.1, 0.0]}}},
    {"curves": {"head": {"sizes": [], "changes": []}}},
    {"axes": {"L0.head": "other"}},
    {"axes": {"other": "head"}},
    {"together": None},
    {"layers": {}},
    {"layers": {"other": -0.1}},
    {"layers": {"layers": "-0.1"}},
    {"batch": 3},
    {"more": 1},
]


def test_a_damaged_table_is_measured_again(classifier, monkeypatch):
    host = secateur.open(classifier)
    axes = {a.name: "head" for kind in ("head", "ffn") for a in host.layout.of_kind(kind)}
    layers = {host.layout.of_kind("layer")[0].name: -0.2}
    whole = LatencyTable("torch", 2, 9, 1, 10.0, {"head": Curve((2, 4), (-0.1, 0.0))}, axes, layers=layers)
    measured, said = [], []
    monkeypatch.setattr(latency_table, "artefacts", lambda *a: {})
    monkeypatch.setattr(latency_table, "measure", lambda *a: measured.append(1) or ({}, 1.0))
    monkeypatch.setattr(latency_table, "assemble", lambda *a, **k: whole)

    def table():
        return secateur.deploy.latency_table(host, "torch", batch=2, length=9, points=2, turns=1, say=said.append)

    assert table() == table() == whole
    assert (len(measured), said) == (1, [])
    (file,) = latency_table.cache_file().parent.glob("latency-*.json")
    for text in ["[" * 100_000, *(json.dumps({**whole.as_json(), **changes}) for changes in DAMAGES)]:
        file.write_text(text)
        measured.clear()
        said.clear()
        assert table() == table() == whole
        assert len(measured) == 1, text
        (sentence,) = said
        assert str(file) in sentence
        assert sentence.endswith("; measuring again")


@pytest.mark.slow
def test_a_table_is_measured_once(classifier, monkeypatch):
    host = secateur.open(classifier)
    found = secateur.deploy.latency_table(host, "torch", batch=2, length=9, points=2, turns=1)
    assert found.dense_ms > 0
    assert set(found.axes) == {a.name for kind in ("head", "ffn") for a in host.layout.of_kind(kind)}
    monkeypatch.setattr(latency_table, "measure", lambda *a: pytest.fail("measured again"))
    assert secateur.deploy.latency_table(host, "torch", batch=2, length=9, points=2, turns=1) == found
