"""The walk from a target to a model that was measured, on a tiny classifier; times are made up where that is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
import transformers

from secateur.cost import macs
from secateur.errors import PlanError, SecateurError
from secateur.record import read_record
from secateur.search import stages, walk
from secateur.search.choosing import chooser
from secateur.search.choosing.chooser import Settings
from secateur.search.costs import macs_cost
from secateur.search.measure import Measured
from secateur.search.target import Call, Limit, Target
from secateur.search.walk import automatic as search
from tests.search import rows as rows_of

HALF = Target(limits=(Limit("macs", 0.5),))
QUICK = {"heal_seconds": 0.0, "search_seconds": 0.0}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return rows_of.classifier(tmp_path_factory.mktemp("classifier"))


def made_up(shares):
    """A `measure` that gives one share of the dense time after the other, the last one for ever."""
    left = list(shares)

    def measure(dense, folder, call, work, **options):
        share = left.pop(0) if len(left) > 1 else left[0]
        share = share(folder) if callable(share) else share
        work.mkdir(parents=True, exist_ok=True)
        return Measured(
            runtime=call.runtime,
            batch=call.batch,
            length=call.length,
            threads=call.threads,
            dense_ms=10.0,
            ms=10.0 * share,
            speed_up=1 / share,
            interval=(1 / share, 1 / share),
            spread=(1 / share, 1 / share),
            turns=3,
            dense_bytes=1,
            bytes=1,
            dense_memory=1,
            memory=1,
            parity=None,
            token_speed_up=None,
            token_ms=None,
            dense_artefact=work,
            artefact=folder,
        )

    return measure


def timed_as_macs(host, monkeypatch):
    """Latency is predicted as the MACs are; returns the target of twice the speed."""
    limit = Limit("latency", 0.5, call=Call("torch"))
    cost = replace(macs_cost(host.layout, Limit("macs", 0.5)), limit=limit)
    monkeypatch.setattr(stages, "costs_of", lambda *args, **options: (cost,))
    return Target(limits=(limit,), call=limit.call)


def test_half_the_macs_are_half_and_the_folder_opens_and_says_what_was_measured(opened, tmp_path):
    host, task, rows = opened
    found = search(host, task, HALF, rows, tmp_path / "out", **QUICK)
    assert found.is_met
    assert found.best.costs["macs"] <= 0.5
    small = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert small.num_parameters() == found.best.parameters[0] < found.best.parameters[1]
    said = json.loads((tmp_path / "out" / "secateur-search.json").read_text())
    assert said["met"]
    assert said["asked"]["limits"] == [{"quantity": "macs", "bound": 0.5, "relative": True, "call": None}]
    assert said["dense"] - said["pruned"] == pytest.approx(said["drop"])
    assert len(said["drop_interval"]) == 2
    assert said["best"]["kept"] == found.best.candidate.kept
    assert host.layout.sizes == opened[0].layout.sizes
    record = read_record(tmp_path / "out")
    (limit,) = record.asked
    assert (limit.what, limit.asked, limit.is_met) == ("multiply-accumulates", "50.0% of the dense model", True)
    assert limit.reached == f"{found.best.costs['macs']:.1%} of the dense model"
    assert record.quality.drop == said["drop"]
    assert record.sizes.parameters == small.num_parameters()
    assert record.sizes.macs_share == pytest.approx(found.best.costs["macs"])
    dense, point = record.frontier
    assert (dense.group, dense.value, dense.parameters_share) == ("dense", said["dense"], 1.0)
    assert (point.name, point.group, point.value, point.is_result) == ("out", "chosen", said["pruned"], True)
    kept = {one.axis: one.kept for one in record.units if one.kept < one.total}
    assert kept.items() >= {axis: n for axis, n in said["best"]["kept"].items() if n}.items()


def test_a_choice_is_never_farther_than_the_same_share_of_every_axis(opened, tmp_path):
    host, task, rows = opened
    made = stages.Stages(host, task, HALF, rows, tmp_path, Settings(0.0, 0.0))
    chosen = made.refined(made.chosen(made.costs), made.costs)
    evenly = made.uniform("uniform", made.costs)
    assert chosen.divergence <= made.trial(chosen.method, chosen.ridge).divergence(evenly.candidate)
    assert all(cost.of(chosen.candidate) <= cost.bound for cost in made.costs)


@pytest.mark.slow
def test_a_drop_that_cannot_be_met_writes_nothing_and_says_what_can_be_reached(opened, tmp_path):
    host, task, rows = opened
    target = replace(HALF, max_drop=1e-12, by_divergence=True)
    found = search(host, task, target, rows, tmp_path / "out", **QUICK)
    assert not found.is_met
    assert not (tmp_path / "out").exists()
    assert [point.name for point in found.points] == ["asked", "part-0.75", "part-0.5", "part-0.25"]
    divergences = [point.final.kl for point in found.points]
    assert divergences == sorted(divergences, reverse=True)
    assert "the model loses" in found.reading
    assert f"{found.points[-1].final.kl:.4g} KL" in found.reading


@pytest.mark.slow
def test_the_closest_model_is_written_when_asked_for(opened, tmp_path):
    host, task, rows = opened
    target = replace(HALF, max_drop=1e-12, by_divergence=True, closest=True)
    found = search(host, task, target, rows, tmp_path / "out", **QUICK)
    assert not found.is_met
    assert json.loads((tmp_path / "out" / "secateur-search.json").read_text())["met"] is False
    assert found.best.costs["macs"] <= 0.5


def test_a_bound_below_every_size_is_refused_with_the_least_that_can_be_reached(opened, tmp_path):
    host, task, rows = opened
    with pytest.raises(PlanError, match=r"cannot be reached: the least is \d"):
        search(host, task, Target(limits=(Limit("macs", 1e-9),)), rows, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept(opened, tmp_path):
    host, task, rows = opened
    (tmp_path / "out").mkdir()
    with pytest.raises(SecateurError, match="exists"):
        search(host, task, HALF, rows, tmp_path / "out", **QUICK)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_measurement_that_misses_corrects_the_costs_until_it_fits(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    target = timed_as_macs(host, monkeypatch)
    dense = macs(host.layout)

    def slower(folder):
        """Every model takes a fifth longer than predicted."""
        plan = automatic_plan(folder)
        return 1.2 * macs(host.layout, plan) / dense

    monkeypatch.setattr(stages, "measure", made_up([slower]))
    found = search(host, task, target, rows, tmp_path / "out", work=tmp_path / "work", **QUICK)
    assert found.is_met
    assert found.best.speed_up >= 2 / 1.03
    assert found.best.costs["latency@torch"] == pytest.approx(1 / found.best.speed_up, rel=0.03)


def automatic_plan(folder):
    """The plan of a point: what its model keeps, read off its sizes."""
    small = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    keep = {}
    for number, layer in enumerate(small.bert.encoder.layer):
        keep[number] = layer.attention.self.num_attention_heads, layer.intermediate.dense.out_features
    return SizePlan(keep)


class SizePlan:
    """A plan of which only sizes count."""

    def __init__(self, sizes):
        self.sizes = sizes

    @property
    def keep(self):
        heads = {f"L{n}.head": np.arange(h) for n, (h, _) in self.sizes.items()}
        return heads | {f"L{n}.ffn": np.arange(f) for n, (_, f) in self.sizes.items()}


def test_a_target_missed_when_measured_is_missed_whatever_was_predicted(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    target = timed_as_macs(host, monkeypatch)
    monkeypatch.setattr(stages, "measure", made_up([0.9]))
    found = search(host, task, target, rows, tmp_path / "out", **QUICK)
    assert not found.is_met
    assert "latency@torch is 1.800 times what is permitted" in found.reading
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_permitted_divergence_alone_gives_the_fastest_model_within_it(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    target = replace(timed_as_macs(host, monkeypatch), limits=(), max_drop=0.05, by_divergence=True)
    monkeypatch.setattr(walk, "LADDER", (1.2, 1.5, 2.0, 3.0))
    monkeypatch.setattr(
        stages, "measure", made_up([lambda folder: macs(host.layout, automatic_plan(folder)) / macs(host.layout)])
    )
    found = search(host, task, target, rows, None, work=tmp_path / "work", **QUICK)
    assert found.is_met
    assert found.best.final.kl <= 0.05
    faster = [point for point in found.points if point.speed_up > found.best.speed_up]
    assert all(point.final.kl > 0.05 for point in faster)


@pytest.mark.slow
def test_a_killed_search_goes_on_from_its_finished_stages(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    options = {"work": tmp_path / "work", "heal_seconds": 60.0, "search_seconds": 0.0}
    real = stages.heal

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "heal", killed)
    with pytest.raises(KeyboardInterrupt):
        search(host, task, HALF, rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stages, "heal", lambda *args, **kwargs: real(*args, **kwargs, rounds=1))
    monkeypatch.setattr("secateur.search.stored.collect_curvature", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(chooser, "choose", lambda *args, **options: 1 / 0)
    found = search(host, task, HALF, rows, tmp_path / "out", **options)
    assert found.best.healed.rounds
    monkeypatch.setattr(stages, "heal", lambda *args, **kwargs: 1 / 0)
    again = search(host, task, HALF, rows, tmp_path / "out", overwrite=True, **options)
    assert again.best.final.values == found.best.final.values
    assert again.best.final.kl == pytest.approx(found.best.final.kl, abs=1e-9)


@pytest.mark.slow
def test_a_frontier_has_a_model_for_each_speed_and_a_uniform_one_beside_it(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    target = replace(timed_as_macs(host, monkeypatch), limits=())
    monkeypatch.setattr(
        stages, "measure", made_up([lambda folder: macs(host.layout, automatic_plan(folder)) / macs(host.layout)])
    )
    found = search(host, task, target, rows, tmp_path / "out", frontier=(2, 1.3), **QUICK)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.3x", "2x", "secateur-search.json"]
    assert [point.name for point in found.baselines] == ["uniform-1.3x", "uniform-2x"]
    assert all(p.pruned.kl <= b.pruned.kl for p, b in zip(found.points, found.baselines, strict=True))


def test_a_speed_that_nothing_reaches_ends_a_frontier_and_keeps_the_others(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    target = replace(timed_as_macs(host, monkeypatch), limits=())
    monkeypatch.setattr(
        stages, "measure", made_up([lambda folder: macs(host.layout, automatic_plan(folder)) / macs(host.layout)])
    )
    said = []
    found = search(host, task, target, rows, tmp_path / "out", frontier=(1.3, 1e6), say=said.append, **QUICK)
    assert [point.name for point in found.points] == ["1.3x"]
    record, (point,) = read_record(tmp_path / "out" / "1.3x"), found.points
    shown = [(one.name, one.group, one.is_result) for one in record.frontier]
    assert shown == [("dense", "dense", False), ("1.3x", "chosen", True), ("uniform-1.3x", "uniform", False)]
    assert record.frontier[1].latency_share == pytest.approx(1 / point.speed_up)
    assert record.asked[0].asked == "1.3x"
    (speed,) = record.speeds
    assert (speed.runtime, speed.dense_ms, speed.ms) == ("torch", 10.0, pytest.approx(10.0 / point.speed_up))
    assert any("1e+06x and faster are left out" in line for line in said)


def test_the_divergence_of_a_decoder_counts_where_texts_have_no_labels(tmp_path):
    host, task, rows = rows_of.llama(tmp_path)
    found = search(host, task, Target(limits=(Limit("params", 0.9),)), rows, tmp_path / "out", **QUICK)
    assert found.is_met
    assert found.best.parameters[0] <= 0.9 * found.best.parameters[1]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
