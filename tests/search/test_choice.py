"""The choice of sizes against exact dynamic programming, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from secateur.errors import PlanError
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import bounded, choose, expected, uniform, within
from secateur.search.choosing.layers import with_layers
from secateur.search.costs import Cost
from secateur.search.levels import AxisLevels, Levels
from secateur.search.target import Limit
from tests.search.fakes import cost_of, exact, levels_of, loss


def small(losses, bound, allowed=None):
    """Levels and a cost of axes a, b, ... whose units cost the same."""
    axes = {
        name: AxisLevels(name, "ffn", np.arange(len(own) - 1), np.array(own, float)) for name, own in losses.items()
    }
    whole = sum(axis.size for axis in axes.values())
    curves = {name: (np.arange(axis.size + 1) - axis.size) / whole for name, axis in axes.items()}
    counts = {name: np.array((allowed or {}).get(name, range(1, axis.size + 1))) for name, axis in axes.items()}
    return Levels("kfac", axes), Cost(Limit("macs", bound), whole, curves, counts)


def test_units_go_where_they_lose_least():
    levels, cost = small({"a": [0, 1, 5, 20], "b": [0, 10, 30, 60]}, 4 / 6)
    assert choose(levels, [cost]) == Candidate({"a": 1})


def test_only_allowed_counts_are_chosen():
    levels, cost = small({"a": [0, 1, 5, 20], "b": [0, 10, 30, 60]}, 5 / 6, {"a": [1, 3], "b": [1, 2, 3]})
    assert choose(levels, [cost]).kept == {"a": 1}  # loss 5; one of b alone would lose 10


def test_a_size_at_which_the_model_cannot_run_is_never_chosen():
    levels, cost = small({"a": [0, 1, np.inf, np.inf], "b": [0, 10, 30, 60]}, 4 / 6)
    assert choose(levels, [cost]).kept == {"a": 2, "b": 2}


def test_units_without_a_loss_go_though_the_bound_does_not_ask_for_it():
    levels, cost = small({"a": [0, 0, 0, 20], "b": [0, 10, 30, 60]}, 1.0)
    assert choose(levels, [cost]).kept == {"a": 1}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bound", [0.75, 0.5, 0.25])
def test_the_choice_is_within_two_per_cent_of_dynamic_programming(seed, bound):
    rng = np.random.default_rng(100 + seed)
    levels = levels_of(rng.integers(8, 60, rng.integers(4, 12)), seed)
    cost = cost_of(levels, bound, seed)
    candidate = choose(levels, [cost])
    best = exact(levels, cost)
    assert within(candidate, [cost])
    assert best - 1e-9 <= loss(levels, candidate) <= 1.02 * best


@pytest.mark.parametrize("seed", range(6))
def test_costs_that_fall_in_steps_are_chosen_as_well(seed):
    levels = levels_of([48] * 8, seed)
    cost = cost_of(levels, 0.4, seed, steps=8)
    candidate = choose(levels, [cost])
    assert within(candidate, [cost])
    assert loss(levels, candidate) <= 1.02 * exact(levels, cost)


def test_a_choice_is_never_worse_than_the_same_share_everywhere():
    for seed in range(10):
        levels = levels_of([12, 40, 12, 40, 12, 40], seed)
        cost = cost_of(levels, 0.5, seed)
        assert loss(levels, choose(levels, [cost])) <= loss(levels, uniform(levels, cost))


@pytest.mark.parametrize("seed", range(8))
def test_two_costs_hold_together_near_the_optimum(seed):
    levels = levels_of([5, 6, 5, 6], seed)
    costs = [cost_of(levels, 0.6, seed), cost_of(levels, 0.65, seed + 50, quantity="params")]
    candidate = choose(levels, costs)
    assert within(candidate, costs)
    best = np.inf
    for kept in np.ndindex(5, 6, 5, 6):
        other = Candidate({f"a{i}": n + 1 for i, n in enumerate(kept)})
        if within(other, costs):
            best = min(best, loss(levels, other))
    assert best - 1e-9 <= loss(levels, candidate) <= 1.1 * best


def test_a_second_cost_that_holds_anyway_changes_nothing():
    levels = levels_of([12, 40, 12, 40], 3)
    first = cost_of(levels, 0.5, 3)
    assert choose(levels, [first, cost_of(levels, 0.999, 3, quantity="params")]) == choose(levels, [first])


def test_a_bound_out_of_reach_is_refused_with_the_least_cost():
    levels, cost = small({"a": [0, 1, 5, 20], "b": [0, 10, 30, 60]}, 0.2)
    with pytest.raises(PlanError, match=r"macs of 20\.0% cannot be reached: the least is 33\.3% of the dense"):
        choose(levels, [cost])
    with pytest.raises(PlanError, match=r"the least is 33\.3%"):
        uniform(levels, cost)
    absolute = replace(cost, limit=Limit("params", 1, relative=False))
    with pytest.raises(PlanError, match="a params of 1 cannot be reached: the least is 2 parameters"):
        choose(levels, [absolute])


def test_a_correction_counts():
    levels = levels_of([30, 30], 1)
    cost = cost_of(levels, 0.6, 1)
    corrected = replace(cost, correction=1.2)
    assert corrected.of(choose(levels, [corrected])) <= 0.6 + 1e-9
    assert cost.of(choose(levels, [corrected])) <= 0.5 + 1e-9


def test_axes_of_dropped_layers_are_not_named_and_their_cost_is_that_of_the_layer():
    levels = levels_of([10, 10], 2, layers=[1.0, 2.0])
    cost = cost_of(levels, 0.45, weights=1, layers=0.5)
    inside = {"a0": ("layers", 0), "a1": ("layers", 1)}
    candidate = choose(levels, [cost], dropped={"layers": (0,)}, inside=inside)
    assert candidate.dropped == {"layers": (0,)}
    assert candidate.kept == {"a1": 9}


def test_a_frontier_loses_more_at_each_tighter_bound():
    levels = levels_of([40] * 6, 5)
    cost = cost_of(levels, 1.0, 5)
    losses = [expected(levels, c) for c in (choose(levels, [bounded(cost, share)]) for share in (0.8, 0.6, 0.4))]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_uniform_keeps_the_largest_share_that_fits():
    levels = levels_of([10, 20], 0)
    cost = cost_of(levels, 0.5, weights=1)
    assert uniform(levels, cost).kept == {"a0": 5, "a1": 10}


def layered(bound):
    """Four layers of one axis, the second of which hardly matters."""
    losses = {f"a{i}": 1e-3 * np.arange(11.0) ** 2 for i in range(4)}
    axes = {name: AxisLevels(name, "ffn", np.arange(10), own) for name, own in losses.items()}
    levels = Levels("kfac", axes, {"layers": np.array([9.0, 0.01, 9.0, 9.0])})
    curves = {name: (np.arange(11) - 10) / 50 for name in axes}  # 10 of 50 lie outside the axes: a quarter a layer each
    cost = Cost(
        Limit("macs", bound), 50, curves, {name: np.arange(1, 11) for name in axes}, {"layers": np.full(4, -0.25)}
    )
    inside = {f"a{i}": ("layers", i) for i in range(4)}

    def divergence(candidate):
        widths = sum(2 * axes[a].losses[10 - n] for a, n in candidate.kept.items())
        return widths + sum(levels.layers["layers"][i] for i in candidate.dropped.get("layers", ()))

    return levels, cost, inside, divergence


def test_a_layer_that_hardly_matters_goes_before_widths():
    levels, cost, inside, divergence = layered(0.7)
    best, *others = with_layers(levels, [cost], divergence, inside=inside)
    assert best.dropped == {"layers": (1,)}
    assert within(best, [cost])
    assert "a1" not in best.kept
    assert {c.dropped.get("layers", ()) for c in others} >= {()}


def test_layers_go_where_widths_alone_do_not_reach_the_bound():
    levels, cost, inside, divergence = layered(0.25)
    found = with_layers(levels, [cost], divergence, inside=inside)
    assert all(candidate.dropped for candidate in found)
    with pytest.raises(PlanError, match="the least is"):
        with_layers(levels, [replace(cost, limit=Limit("macs", 0.01))], divergence, inside=inside)
