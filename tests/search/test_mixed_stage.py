"""The walk to a latency with zeros beside units, on a tiny classifier; times are made up where that is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from secateur.deploy.target import DeployError
from secateur.errors import TargetError
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.runtime.compile_model import compile
from secateur.search import stages
from secateur.search.sparse import stage
from secateur.search.sparse.times import SparseTimes
from secateur.search.target import Call, Limit, Target, make_target
from secateur.search.walk import automatic as search
from tests.search import rows as rows_of
from tests.search.test_automatic import automatic_plan, made_up

CALL = Call("secateur", 1, 16, 1)
QUICK = {"heal_seconds": 0.0, "search_seconds": 0.0}
SLOWER = 1.3
"""How many times as long as predicted the made-up measurement takes."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return rows_of.classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def timed(opened, monkeypatch):
    """A target that zeros alone do not reach; models take `SLOWER` as long as the made-up times say."""
    layout = opened[0].layout
    names = tuple(default_weights(layout))
    units = {axis.name: 0.1 if kind == "head" else 1e-3 for kind in ("head", "ffn") for axis in layout.of_kind(kind)}
    times = SparseTimes(10.0, 0.1, units, 0.005, 1e-4, names, 0.0)
    monkeypatch.setattr(stage, "times_at", lambda *args, **options: times)

    def taken(folder):
        of_units = times.of(layout, automatic_plan(folder), dict.fromkeys(names, 0.0))
        return SLOWER * (of_units + times.per_weight * sum(kept_in(folder, names).values())) / times.dense_ms

    monkeypatch.setattr(stages, "measure", made_up([taken]))
    bound = times.of(layout, Plan(), dict.fromkeys(names, 0.02)) / times.dense_ms
    return Target(limits=(Limit("latency", bound, call=CALL),), call=CALL, zeros=True)


def kept_in(folder, names):
    """Weight -> how many of its numbers are not zero in a saved model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return {name: int((model.get_parameter(name) != 0).sum()) for name in names}


@pytest.mark.slow
def test_units_and_zeros_meet_a_latency_once_the_times_are_corrected(opened, timed, tmp_path):
    host, task, rows = opened
    said = []
    found = search(host, task, timed, rows, tmp_path / "out", say=said.append, **QUICK)
    assert found.is_met
    assert any("the costs are corrected" in line for line in said)
    bound = timed.limits[0].bound
    assert found.best.costs["latency@secateur"] == pytest.approx(bound, rel=0.05)
    assert found.best.measured[CALL].share == pytest.approx(bound, rel=0.05)


def test_the_saved_model_has_the_share_of_zeros_that_was_chosen(opened, timed, tmp_path):
    host, task, rows = opened
    found = search(host, task, timed, rows, tmp_path / "out", **QUICK)
    chosen, plan = found.best.candidate, Plan.load(tmp_path / "out")
    assert 0 < sum(chosen.kept.values()) < sum(host.layout.axis(axis).size for axis in chosen.kept)
    assert set(chosen.densities) == set(default_weights(host.layout))
    for name, kept in kept_in(tmp_path / "out", list(chosen.densities)).items():
        size = np.prod(host.layout.kept_shape(name, plan.keep))
        assert kept == pytest.approx(chosen.densities[name] * size, abs=1)
    assert found.best.as_json()["densities"] == chosen.densities


def test_a_latency_in_milliseconds_is_met_too(opened, timed, tmp_path):
    host, task, rows = opened
    limit = replace(timed.limits[0], bound=10 * timed.limits[0].bound, relative=False)  # the dense model takes 10 ms
    found = search(host, task, replace(timed, limits=(limit,)), rows, None, **QUICK)
    assert found.is_met
    assert found.best.measured[CALL].ms == pytest.approx(limit.bound, rel=0.05)


@pytest.mark.slow
def test_healing_changes_weights_and_keeps_zeros(opened, timed, tmp_path, monkeypatch):
    host, task, rows = opened
    real = stages.heal
    monkeypatch.setattr(stages, "heal", lambda *args, **options: real(*args, **options, rounds=1))
    options = {"heal_seconds": 60.0, "search_seconds": 0.0}
    found = search(host, task, timed, rows, tmp_path / "out", work=tmp_path / "work", **options)
    assert found.best.healed.best == 1
    plan = Plan.load(tmp_path / "out")
    kept = kept_in(tmp_path / "out", list(plan.masks))
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == kept
    assert found.best.final.kl < found.best.pruned.kl

    def never(*args, **options):
        raise AssertionError("a finished stage has run again")

    monkeypatch.setattr(stages, "heal", never)
    monkeypatch.setattr(stage, "choose_mixed", never)
    monkeypatch.setattr("secateur.search.stored.collect_curvature", never)
    again = search(host, task, timed, rows, tmp_path / "again", work=tmp_path / "work", **options)
    assert again.best.candidate == found.best.candidate
    assert again.best.final.kl == pytest.approx(found.best.final.kl, abs=1e-9)
    assert kept_in(tmp_path / "again", list(plan.masks)) == kept


@pytest.mark.slow
def test_the_saved_model_runs_on_the_sparse_kernels(opened, timed, tmp_path):
    host, task, rows = opened
    search(host, task, timed, rows, tmp_path / "out", **QUICK)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = stage.made_up(host, tmp_path / "out", CALL)
    fast = compile(model, tokens=16, measure=False, example=batch)
    assert fast.secateur_report.blocks
    with torch.inference_mode():
        torch.testing.assert_close(fast(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_a_latency_that_no_zeros_reach_is_refused(opened, timed, tmp_path):
    host, task, rows = opened
    limit = replace(timed.limits[0], bound=0.001)
    with pytest.raises(stages.PlanError, match=r"no units and zeros take 0\.01 ms"):
        search(host, task, replace(timed, limits=(limit,)), rows, None, **QUICK)


def test_the_timed_inputs_have_the_shape_of_the_call_and_no_padding(opened):
    host = opened[0]
    batch = stage.made_up(host, Path(host.source), Call("secateur", 3, 7, 1))
    assert batch["input_ids"].shape == (3, 7)
    assert batch["attention_mask"].eq(1).all()
    assert len(batch["input_ids"].unique()) > 1


def test_times_are_taken_on_the_threads_of_the_call(opened, monkeypatch):
    host, before = opened[0], torch.get_num_threads()
    seen = []
    times = SparseTimes(1.0, 0.1, {}, 0.0, 1e-4, (), 0.0)
    monkeypatch.setattr(stage, "kernel_times", lambda *args, **options: seen.append(torch.get_num_threads()) or times)
    stage.times_at(host, Path(host.source), replace(CALL, threads=before + 1))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_a_call_longer_than_the_model_or_too_small_to_gain_is_refused(opened, monkeypatch):
    host, folder = opened[0], Path(opened[0].source)
    with pytest.raises(DeployError, match="length 65 is more than the 64 positions of the model; lower --length"):
        stage.times_at(host, folder, replace(CALL, length=65))
    noise = SparseTimes(1.0, 0.1, {}, 0.0, -1e-9, (), 0.0)
    monkeypatch.setattr(stage, "kernel_times", lambda *args, **options: noise)
    with pytest.raises(DeployError, match="zeros save no time that can be measured at calls of 1 x 16; make --batch"):
        stage.times_at(host, folder, CALL)


def test_zeros_go_with_one_latency_on_the_runtime_that_runs_them_fast():
    assert make_target(2, "secateur", zeros=True).zeros
    assert make_target(limits=["latency<=12ms@secateur"], max_drop=0.01, zeros=True).zeros


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"speed_up": 2, "on": "onnx"},
            "zeros are fast on secateur, and the latency is limited on onnx; add --on secat",
        ),
        ({"limits": ["params<=0.5"]}, "zeros are chosen for a latency, and none is limited; add --speed-up 2 --on sec"),
        ({"limits": ["memory<=0.5"], "on": "secateur"}, "zeros are chosen for a latency, and none is limited"),
        ({"max_drop": 0.01, "on": "secateur"}, "zeros are chosen for a latency, and none is limited"),
        (
            {"speed_up": 2, "on": "secateur", "limits": ["params<=0.5"]},
            "zeros are chosen for one latency, and 2 limits are given; keep the latency alone, or leave --zeros out",
        ),
    ],
)
def test_zeros_without_it_are_refused(asked, sentence):
    with pytest.raises(TargetError, match=sentence):
        make_target(**asked, zeros=True)


def test_zeros_along_a_frontier_are_refused(opened):
    host, task, rows = opened
    target = make_target(2, "secateur", zeros=True)
    with pytest.raises(TargetError, match="not along a frontier; leave out --zeros or --frontier"):
        search(host, task, target, rows, None, frontier=(2, 3))
