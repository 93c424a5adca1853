"""Levels of real models, the plans of candidates, and what is kept on disk."""

import json

import numpy as np
import pytest
import torch

import secateur
from secateur.errors import DataError, PlanError
from secateur.plan import Plan
from secateur.search import stored
from secateur.search.build import plan_of
from secateur.search.candidate import Candidate
from secateur.search.levels import layers_of, levels_of
from secateur.tasks.base.task import Task
from secateur.torch.stats.curvature import collect_curvature
from tests import zoo


class Classes(Task):
    """Classes of any model that gives logits."""

    name = "classes"
    encode = collate = metrics = shown = None

    def __init__(self):
        pass

    def positions(self, output, batch):
        logits = output.logits.reshape(-1, output.logits.shape[-1])
        return [(logits, torch.arange(len(logits)) * len(output.logits) // len(logits))]


Classes.__abstractmethods__ = frozenset()


def opened(make, batches=6):
    model = make()
    data = [zoo.inputs(model, seed) for seed in range(batches)]
    host = secateur.open(model, data[0])
    return host, data, collect_curvature(model, host.layout, data, Classes().fisher_loss)


def half(levels):
    """A candidate with half of every axis that may have so many."""
    counts = {name: axis.size // 2 for name, axis in levels.axes.items()}
    return Candidate({n: c for n, c in counts.items() if np.isfinite(levels.axes[n].losses[levels.axes[n].size - c])})


def distance(host, plan, data):
    task, total = Classes(), []
    for batch in data:
        dense = host.model(**batch)
        with host.masked(plan):
            total.append(task.divergence(host.model(**batch), dense, batch).mean())
    return float(torch.stack(total).mean().detach())


@pytest.mark.parametrize("method", ["kfac", "fisher"])
@pytest.mark.parametrize("make", [zoo.bert, zoo.llama, zoo.vit, zoo.gpt2, zoo.t5])
def test_masked_and_shrunk_agree_with_refitted_weights_and_biases(make, method):
    host, data, stats = opened(make)
    levels = levels_of(host, stats, method)
    plan = plan_of(host, levels, stats, half(levels))
    before = host.outputs(data[0])
    assert secateur.verify(host, plan, data[:1]).difference <= 1e-5
    assert all(np.array_equal(a, b) for a, b in zip(before, host.outputs(data[0]), strict=True))
    assert plan.weights
    assert plan.keep
    biases = {name for name in plan.weights if name.endswith("bias")}
    assert bool(biases) == any(axis.bias for axis in levels.axes.values())


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama])
def test_refitted_weights_are_nearer_to_the_dense_model(make):
    host, data, stats = opened(make)
    levels = levels_of(host, stats)
    mended, plain = (plan_of(host, levels, stats, half(levels), compensate=c) for c in (True, False))
    assert not plain.weights
    assert distance(host, mended, data) < 0.9 * distance(host, plain, data)


def test_levels_say_what_is_searched_and_why_the_rest_is_not():
    host, _, stats = opened(zoo.llama)
    levels = levels_of(host, stats)
    assert [*levels.axes] == [f"L{i}.{kind}" for i in range(3) for kind in ("kv", "ffn")]
    assert levels.axes["L0.kv"].weight == "model.layers.0.self_attn.o_proj.weight"
    assert levels.axes["L0.kv"].losses[0] == 0
    assert levels.axes["L0.kv"].losses[-1] == np.inf
    assert (np.diff(levels.axes["L0.ffn"].losses[:-1]) >= 0).all()
    assert "searched through L0.kv" in levels.notes["L0.head"]
    assert "frozen" in levels.notes["qk"]
    assert set(levels.notes) | set(levels.axes) | {"layers"} == set(host.layout.axes)
    with pytest.raises(PlanError, match="choose kfac or fisher"):
        levels_of(host, stats, "magic")


def test_axes_without_one_matrix_that_reads_them_have_fisher_curves_and_no_refit():
    host, _, stats = opened(zoo.mixtral, 3)
    levels = levels_of(host, stats)
    for name in ("L0.expert", "L0.ffn"):
        axis = levels.axes[name]
        gates = stats.mean("fisher_gate", name)
        assert axis.weight is None
        assert axis.order.tolist() == np.argsort(gates, kind="stable").tolist()
    ffn = levels.axes["L0.ffn"]  # it keeps multiples of 8
    assert [count for count in range(25) if np.isfinite(ffn.losses[24 - count])] == [8, 16, 24]
    host, _, stats = opened(zoo.t5, 2)
    heads = levels_of(host, stats).axes["encoder.head"]
    assert heads.weight is None
    assert heads.losses[1] == pytest.approx(stats.mean("fisher_gate", "encoder.head").min() / 2)


def test_layers_go_through_their_axis_and_their_divergence_is_measured():
    host, data, stats = opened(zoo.bert, 2)
    levels = levels_of(host, stats)
    measured = layers_of(
        host.layout, lambda dropped: distance(host, plan_of(host, levels, stats, Candidate(dropped=dropped)), data)
    )
    assert measured["layers"].shape == (3,)
    assert (measured["layers"] > 0).all()
    plan = plan_of(host, levels, stats, Candidate({"L0.ffn": 24}, {"layers": (1,)}))
    assert plan.keep["layers"].tolist() == [0, 2]
    assert secateur.verify(host, plan, data[:1]).difference <= 1e-5


def test_a_size_is_solved_once():
    host, _, stats = opened(zoo.bert, 2)
    levels, cache = levels_of(host, stats), {}
    first, second = (plan_of(host, levels, stats, Candidate({"L0.ffn": 9}), 0.1, cache=cache) for _ in range(2))
    name = levels.axes["L0.ffn"].weight
    assert first.weights[name] is second.weights[name]
    plan_of(host, levels, stats, Candidate({"L0.ffn": 9}), 1.0, cache=cache)
    assert [*cache] == [("kfac", "L0.ffn", 9, 0.1), ("kfac", "L0.ffn", 9, 1.0)]


def test_weights_without_zeros_are_written_once_and_given_back():
    host, _, _ = opened(zoo.bert, 1)
    name = "bert.encoder.layer.0.output.dense.bias"
    before = host.read(name).clone()
    plan = Plan(weights={name: np.arange(32, dtype=np.float32)})
    with host.masked(plan):
        assert host.read(name).tolist() == list(range(32))
    assert torch.equal(host.read(name), before)
    host.apply(plan)
    host.read(name).add_(1)  # training that follows is not undone
    host.resize(plan)
    assert host.read(name).tolist() == list(range(1, 33))


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_levels_are_read_as_they_were_written(tmp_path):
    host, _, stats = opened(zoo.mixtral, 2)
    levels = levels_of(host, stats)
    stored.save(levels, tmp_path)
    back = stored.load(tmp_path)
    assert (back.method, back.notes, [*back.axes]) == (levels.method, levels.notes, [*levels.axes])
    for name, axis in levels.axes.items():
        assert (back.axes[name].weight, back.axes[name].bias) == (axis.weight, axis.bias)
        np.testing.assert_array_equal(back.axes[name].losses, axis.losses)
        np.testing.assert_array_equal(back.axes[name].order, axis.order)
    path = tmp_path / stored.LEVELS
    data = json.loads(path.read_text())
    data["axes"]["L0.kv"]["order"] = [0, 0]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"order of L0\.kv is none of all its units"):
        stored.load(path)


class Killed(Exception):
    """What stops a run."""


def dying(after):
    def track(items, text):
        for number, item in enumerate(items):
            if number == after:
                raise Killed
            yield item

    return track


def same(a, b):
    return a.counts == b.counts and all(np.array_equal(v, b.sums[q][k]) for q in a.sums for k, v in a.sums[q].items())


def test_a_killed_run_goes_on_and_ends_with_the_same_sums(tmp_path, monkeypatch):
    host, data, _ = opened(zoo.bert)
    whole = stored.collected(host, Classes(), data, chunks=3)
    with pytest.raises(Killed):
        stored.collected(host, Classes(), data, tmp_path, chunks=3, track=dying(2))
    seen = []
    collect = stored.collect_curvature
    monkeypatch.setattr(stored, "collect_curvature", lambda *a, **k: seen.append(k["first"]) or collect(*a, **k))
    assert same(whole, stored.collected(host, Classes(), data, tmp_path, chunks=3))
    assert seen == [4]
    assert same(whole, stored.collected(host, Classes(), data, tmp_path, chunks=3))
    assert seen == [4]


@pytest.mark.parametrize("other", ["weights", "batches", "seed", "damaged"])
def test_sums_of_something_else_are_not_taken_up(other, tmp_path):
    host, data, _ = opened(zoo.bert, 2)
    stored.collected(host, Classes(), data[:1] if other == "batches" else data, tmp_path)
    if other == "weights":
        host.read("classifier.weight").mul_(2)
    if other == "damaged":
        (tmp_path / stored.STATS).write_bytes(b"x" * 100)
    seed = int(other == "seed")
    found = stored.collected(host, Classes(), data, tmp_path, seed=seed)
    assert same(found, stored.collected(host, Classes(), data, seed=seed))


def test_statistics_of_no_data_are_refused(tmp_path):
    host, _, _ = opened(zoo.bert, 1)
    with pytest.raises(DataError, match="there is no batch"):
        stored.collected(host, Classes(), [], tmp_path)
