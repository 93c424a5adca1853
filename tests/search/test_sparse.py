"""Densities of zeros: what they are expected to cost, which are chosen, and the plan that they become."""

from itertools import product

import numpy as np
import pytest
import torch

from secateur.check import verify
from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.repair import prepare, sparsegpt
from secateur.repair.by_curvature import growth, prune_by_curvature
from secateur.search.build import plan_of
from secateur.search.candidate import Candidate
from secateur.search.levels import levels_of
from secateur.search.sparse.densities import (
    OFFERED,
    DensityLosses,
    choose_densities,
    density_losses,
    kept_weights,
    uniform_density,
    with_zeros,
)
from secateur.search.sparse.mixed import Mixed, best_mixed, choose_mixed, mixed_candidates, mixed_plan
from secateur.search.sparse.times import SparseTimes, breaks, kernel_times, on_kernels, sparse_times
from secateur.search.stored import collected
from secateur.tasks.base.evaluate import Reference, evaluate
from tests.search.rows import classifier


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Host, rows, names of linear weights, and statistics that cover all of them."""
    host, task, rows = classifier(tmp_path_factory.mktemp("densities"))
    names = [name for name in host.layout.linears if ".layer." in name]
    return host, rows, names, collected(host, task, rows.calibration, weights=names)


def times(host, names, per_weight=1e-3):
    units = {axis.name: 0.1 if axis.kind == "head" else 0.001 for kind in ("head", "ffn") for axis in _axes(host, kind)}
    return SparseTimes(
        dense_ms=100.0, fixed=1.0, per_unit=units, per_break=0.5, per_weight=per_weight, names=tuple(names), error=0.0
    )


def _axes(host, kind):
    return host.layout.of_kind(kind)


def test_the_growth_is_half_of_the_mean_square_of_gradient_times_change():
    rng = np.random.default_rng(0)
    change, x, g = rng.normal(size=(3, 4)), rng.normal(size=4), rng.normal(size=3)
    assert growth(change, np.outer(x, x), np.outer(g, g)) == pytest.approx((g @ change @ x) ** 2 / 2)


def test_rows_that_matter_more_keep_more():
    weight = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    new = prune_by_curvature(torch.from_numpy(weight), prepare(torch.eye(64)), np.array([100.0, 1.0]), 0.5, sparsegpt)
    kept = (new != 0).sum(1)
    assert kept.sum() == 64
    assert kept[0] > 50


def test_every_linear_weight_has_a_curvature_when_it_is_asked_for(known):
    host, _, names, stats = known
    assert all(stats.has("fisher_in", name) and stats.has("fisher_out", name) for name in names)
    query = next(name for name in names if "query" in name)
    assert stats.mean("fisher_in", query).shape == (host.layout.shape(query)[1],) * 2


def test_weights_that_are_watched_besides_leave_the_curvature_behind_axes_as_it_was(known, tmp_path):
    host, rows, _, stats = known
    alone = collected(host, rows.calibration.task, rows.calibration)
    for name in alone.sums["fisher_in"]:
        np.testing.assert_allclose(stats.mean("fisher_in", name), alone.mean("fisher_in", name), rtol=1e-5)
    for axis in alone.sums["fisher_gate"]:
        np.testing.assert_allclose(stats.mean("fisher_gate", axis), alone.mean("fisher_gate", axis), rtol=1e-4)


def test_losses_rise_as_densities_fall(known):
    host, _, names, stats = known
    losses = density_losses(host, stats, Plan())
    assert set(losses.sizes) == set(names)
    for curve in losses.losses.values():
        assert (np.diff(curve) >= -1e-12).all()


def test_the_choice_is_the_best_of_all_densities_that_keep_as_many():
    curves = {"a": 1.0 / OFFERED, "b": 0.2 / OFFERED**1.5}
    losses = DensityLosses({"a": 100, "b": 300}, curves)
    found = choose_densities(losses, 80)
    kept = 100 * found["a"] + 300 * found["b"]
    assert kept <= 80
    brute = min(
        curves["a"][i] + curves["b"][j]
        for i, j in product(range(len(OFFERED)), repeat=2)
        if 100 * OFFERED[i] + 300 * OFFERED[j] <= kept
    )
    assert losses.total(found) == pytest.approx(brute)


def test_fewer_weights_than_the_least_density_leaves_are_refused():
    losses = DensityLosses({"a": 100}, {"a": 1.0 / OFFERED})
    with pytest.raises(PlanError, match="2 single weights cannot be all that stay: the least is 3"):
        choose_densities(losses, 2)


def test_an_even_density_keeps_as_many_as_asked():
    assert uniform_density(DensityLosses({"a": 100, "b": 300}, {}), 80) == {"a": 0.2, "b": 0.2}


def test_zeros_beside_removed_units_shrink_to_what_the_masked_model_computes(known):
    host, rows, names, stats = known
    levels = levels_of(host, stats)
    kept = {axis.name: axis.size // 2 for axis in _axes(host, "ffn")}
    kept |= {axis.name: 1 for axis in _axes(host, "head")}
    plan = mixed_plan(host, levels, stats, Candidate(kept, densities=dict.fromkeys(names, 0.4)))
    verify(host, plan, list(rows.search)[:1])
    units = plan_of(host, levels, stats, Candidate(kept))
    asked = kept_weights(host.layout, names, units, dict.fromkeys(names, 0.4))
    assert sum(int(plan.masks[name].sum()) for name in names) == pytest.approx(asked, abs=len(names))
    small = host.copy()
    small.resize(plan)
    read = {name: p for name, p in small.model.named_parameters() if name in names}
    assert sum(int((p != 0).sum()) for p in read.values()) == sum(int(plan.masks[n].sum()) for n in names)


def test_biases_make_up_for_the_mean_of_what_zeros_take(known):
    host, _, names, stats = known
    name = names[0]
    plan = with_zeros(host, stats, Plan(), {name: 0.3})
    mean = stats.mean("fisher_mean", name)
    bias = f"{name.removesuffix('weight')}bias"
    before = host.read(name).numpy() @ mean + host.read(bias).numpy()
    np.testing.assert_allclose(plan.weights[name] @ mean + plan.weights[bias], before, atol=1e-5)


def test_candidates_with_units_and_zeros_are_within_the_time(known):
    host, _, names, stats = known
    levels, model = levels_of(host, stats), times(host, names)
    bound = model.of(host.layout, Plan(), dict.fromkeys(names, 0.15))
    found = list(mixed_candidates(host, levels, stats, model, bound, shares=(0.0, 0.1)))
    assert [one.share for one in found] == [0.0, 0.1]
    assert not found[0].candidate.kept
    assert found[1].candidate.kept
    for one in found:
        plan = plan_of(host, levels, stats, one.candidate)
        assert model.of(host.layout, plan, one.candidate.densities) <= bound * (1 + 1e-9)
    best, seen = best_mixed(found, lambda candidate: float(not candidate.kept))
    assert best.share == 0.1
    assert seen == {0.0: 1.0, 0.1: 0.0}


def test_a_time_that_no_zeros_reach_is_refused(known):
    host, _, names, stats = known
    with pytest.raises(PlanError, match="no units and zeros take 1 ms"):
        list(mixed_candidates(host, levels_of(host, stats), stats, times(host, names), 1.0))


def test_times_add_units_and_single_weights(known):
    host, _, names, _ = known
    model = times(host, names)
    whole = model.of(host.layout, Plan(), {})
    entries = sum(host.layout.shape(name)[0] * host.layout.shape(name)[1] for name in names)
    units = sum(0.1 * axis.size for axis in _axes(host, "head")) + sum(0.001 * a.size for a in _axes(host, "ffn"))
    assert whole == pytest.approx(1.0 + units + 1e-3 * entries)
    assert model.room(host.layout, Plan(), whole) == pytest.approx(entries)
    assert model.corrected(2.0).of(host.layout, Plan(), {}) == pytest.approx(2 * whole)


def test_times_are_found_from_models_that_take_what_the_formula_says(known, monkeypatch):
    host, _, names, _ = known
    layout, true = host.layout, times(host, names, per_weight=2e-4)

    def build(plan):
        kept = kept_weights(layout, names, plan, {n: mask.mean() for n, mask in plan.masks.items()})
        return lambda: true.of(layout, plan, {}) - true.per_weight * (kept_weights(layout, names, plan, {}) - kept)

    monkeypatch.setattr("secateur.search.sparse.times.in_turns", lambda calls, turns: [call() for call in calls])
    found = sparse_times(layout, names, build, lambda: 7.0)
    assert found.dense_ms == 7.0
    assert found.error < 0.05  # random masks keep a little more or less than their density
    assert found.per_weight == pytest.approx(true.per_weight, rel=0.1)
    assert found.per_break == pytest.approx(0.5, rel=0.2)
    assert found.per_unit["L0.head"] == pytest.approx(0.1, rel=0.1)


def test_calls_on_the_kernels_give_what_the_cut_model_gives(known):
    host, rows, names, stats = known
    plan = with_zeros(host, stats, Plan(), dict.fromkeys(names, 0.2), sparsegpt)
    batch = {name: value for name, value in rows.search[0].items() if name != "labels"}
    small = host.copy()
    small.resize(plan)
    with torch.inference_mode():
        got = on_kernels(host, batch, 16)(plan)().logits
        torch.testing.assert_close(got, small.model.eval()(**batch).logits, atol=1e-4, rtol=1e-4)


def test_larger_shares_are_not_tried_once_the_divergence_has_risen_twice():
    candidates = [Mixed(Candidate({"a": n}), 0.0, n / 10) for n in range(6)]
    truth = [0.5, 0.3, 0.4, 0.35, 0.1, 0.0]
    best, seen = best_mixed(candidates, lambda candidate: truth[candidate.kept["a"]])
    assert best.share == 0.1
    assert list(seen.values()) == truth[:4]


def test_times_are_kept_and_read_again(known, monkeypatch, tmp_path):
    host, rows, names, _ = known
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    batch = {name: value for name, value in rows.search[0].items() if name != "labels"}
    made_up = times(host, names)  # real ones of so small a model are noise
    monkeypatch.setattr("secateur.search.sparse.times.sparse_times", lambda *args, **options: made_up)
    first = kernel_times(host, batch)
    monkeypatch.setattr("secateur.search.sparse.times.sparse_times", None)
    assert kernel_times(host, batch) == first


def test_damaged_times_are_measured_again(known, monkeypatch, tmp_path):
    host, rows, names, _ = known
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    batch = {name: value for name, value in rows.search[0].items() if name != "labels"}
    wanted = times(host, names)
    monkeypatch.setattr("secateur.search.sparse.times.sparse_times", lambda *args, **options: wanted)
    kernel_times(host, batch)
    next(tmp_path.glob("sparse-*.json")).write_text("{}")
    said = []
    assert kernel_times(host, batch, say=said.append) == wanted
    assert "measuring again" in said[0]


def test_the_choice_is_the_candidate_of_least_divergence_on_the_search_rows(known):
    host, rows, names, stats = known
    levels, model = levels_of(host, stats), times(host, names)
    bound = model.of(host.layout, Plan(), dict.fromkeys(names, 0.3))
    best, seen = choose_mixed(host, rows.search.task, rows.search, levels, stats, model, bound)
    assert seen[best.share] == min(seen.values())
    dense = Reference(rows.search.task, host.model, rows.search)
    with host.masked(mixed_plan(host, levels, stats, best.candidate, method=sparsegpt)):
        pruned = evaluate(rows.search.task, host.model, rows.search, dense)
    assert pruned.kl == pytest.approx(seen[best.share], rel=1e-4)


def test_a_break_is_where_neighbours_have_unlike_numbers_of_heads(known):
    layout = known[0].layout
    assert breaks(layout, Plan()) == 0
    assert breaks(layout, Plan({"L0.head": np.arange(2), "L1.head": np.arange(2)})) == 0
    assert breaks(layout, Plan({"L0.head": np.arange(2), "L1.ffn": np.arange(5)})) == 1
