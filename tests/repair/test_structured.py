"""Orders and refits of whole units, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import DataError, PlanError
from secateur.repair.structured import BLOCK, DAMP, DAMP_OUT, centred, damped, fisher_order, kfac_order, refit


def layer(seed=0, out=5, inputs=12, rows=60):
    """Weight (out, in), rows of inputs with a mean, and gradients (rows, out)."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) + rng.normal(size=inputs)
    return rng.normal(size=(out, inputs)), mixed, rng.normal(size=(rows, out)) @ rng.normal(size=(out, out))


def matrices(seed=0, **sizes):
    weight, x, g = layer(seed, **sizes)
    return weight, x.T @ x / len(x), g.T @ g / len(g)


def closed_loss(weight, inputs, outputs, gone):
    """tr(G D A D^T) / 2 of the best weight without the inputs `gone`, with the damping of the order."""
    inputs, outputs = damped(inputs, DAMP), damped(outputs, DAMP_OUT)
    kept = np.setdiff1d(np.arange(len(inputs)), gone)
    new = np.zeros_like(weight)
    new[:, kept] = weight @ inputs[:, kept] @ np.linalg.inv(inputs[np.ix_(kept, kept)])
    change = weight - new
    return np.trace(outputs @ change @ inputs @ change.T) / 2


def greedy(weight, inputs, outputs, owner):
    """The order by definition: each time the unit without which the closed form loses least."""
    order, losses, left = [], [0.0], list(range(owner.max() + 1))
    while left:
        loss = {u: closed_loss(weight, inputs, outputs, np.flatnonzero(np.isin(owner, [*order, u]))) for u in left}
        best = min(left, key=lambda u: loss[u])
        left.remove(best)
        order.append(best)
        losses.append(loss[best])
    return order, losses


OWNERS = {
    "one input a unit": np.arange(12),
    "units in another order": np.array([3, 1, 0, 2, 7, 5, 6, 4, 11, 10, 9, 8]),
    "three inputs a unit": np.arange(12) // 3,
    "units that lie apart": np.arange(12) % 4,
    "units of unlike sizes": np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3]),
    "inputs that always stay": np.array([0, 1, -1, 2, 3, -1, 4, 5, 6, 7, 8, 9]),
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_the_order_is_greedy_and_its_costs_add_up_to_the_loss_of_the_closed_form(owner):
    weight, inputs, outputs = matrices()
    order, losses = kfac_order(weight, inputs, outputs, owner)
    expected_order, expected_losses = greedy(weight, inputs, outputs, owner)
    assert order.tolist() == expected_order
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)


def test_the_order_holds_beyond_one_block_of_downdates():
    inputs = BLOCK + 20
    weight, a, g = matrices(1, inputs=inputs, rows=200)
    order, losses = kfac_order(weight, a, g, np.arange(inputs))
    assert sorted(order) == list(range(inputs))
    for count in (BLOCK - 1, BLOCK, BLOCK + 1, inputs):
        assert losses[count] == pytest.approx(closed_loss(weight, a, g, order[:count]), rel=1e-8)
    cheapest = min(closed_loss(weight, a, g, [*order[: BLOCK + 5], u]) for u in order[BLOCK + 5 :])
    assert losses[BLOCK + 6] == pytest.approx(cheapest, rel=1e-8)


@given(st.integers(0, 50))
def test_losses_rise_from_zero_and_follow_the_units_when_these_change_places(seed):
    weight, inputs, outputs = matrices(seed)
    order, losses = kfac_order(weight, inputs, outputs, np.arange(12))
    assert losses[0] == 0
    assert (np.diff(losses) >= 0).all()
    places = np.random.default_rng(seed).permutation(12)
    moved, same = kfac_order(weight[:, places], inputs[np.ix_(places, places)], outputs, np.arange(12))
    assert places[moved].tolist() == order.tolist()
    np.testing.assert_allclose(same, losses, rtol=1e-7)


def test_the_fisher_order_takes_the_smallest_square_first_and_halves_the_sum():
    order, losses = fisher_order(np.array([4.0, 1.0, 9.0, 1.0]))
    assert order.tolist() == [1, 3, 0, 2]
    assert losses.tolist() == [0.0, 0.5, 1.0, 3.0, 7.5]


@given(st.integers(0, 50), st.sampled_from([0.01, 1.0]))
def test_a_refit_is_the_least_squares_of_numpy(seed, ridge):
    weight, x, _ = layer(seed)
    kept = np.random.default_rng(seed).random(12) < 0.6
    kept[0] = True
    gram = x.T @ x / len(x)
    new, bias = refit(weight, gram, kept, ridge)
    strength = np.sqrt(ridge * np.trace(gram) / 12)
    rows = np.vstack([x / np.sqrt(len(x)), strength * np.eye(12)])
    expected, *_ = np.linalg.lstsq(rows[:, kept], rows @ weight.T, rcond=None)
    np.testing.assert_allclose(new[:, kept], expected.T, rtol=1e-6, atol=1e-8)
    assert bias is None
    assert not new[:, ~kept].any()


def test_a_bias_makes_up_for_the_mean_as_a_column_of_ones_would():
    weight, x, _ = layer()
    kept = np.arange(12) < 5
    mean, bias = x.mean(0), np.arange(5.0)
    new, new_bias = refit(weight, x.T @ x / len(x), kept, 1e-12, mean, bias)
    wanted = x @ weight.T + bias
    expected, *_ = np.linalg.lstsq(np.hstack([x[:, kept], np.ones((len(x), 1))]), wanted, rcond=None)
    np.testing.assert_allclose(new[:, kept], expected[:-1].T, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(new_bias, expected[-1], rtol=1e-5, atol=1e-7)
    without, _ = refit(weight, x.T @ x / len(x), kept, 1e-12)
    assert ((x @ new.T + new_bias - wanted) ** 2).sum() < ((x @ without.T + bias - wanted) ** 2).sum()


def test_weights_that_all_stay_are_left_as_they_are():
    weight, inputs, _ = matrices()
    new, _ = refit(weight, inputs, np.ones(12, bool), 0.1)
    np.testing.assert_allclose(new, weight, rtol=1e-9)


def test_inputs_that_are_never_seen_cost_nothing_and_break_nothing():
    weight, inputs, outputs = matrices()
    zero = np.zeros_like(inputs)
    new, _ = refit(weight, zero, np.arange(12) < 4, 0.1)
    assert np.isfinite(new).all()
    inputs[3], inputs[:, 3] = 0, 0
    order, losses = kfac_order(weight, inputs, outputs, np.arange(12))
    assert np.isfinite(losses).all()
    assert sorted(order) == list(range(12))


def test_what_cannot_be_solved_is_refused():
    weight, inputs, outputs = matrices()
    for ridge in (0, -1, float("inf"), float("nan")):
        with pytest.raises(PlanError, match="ridge must be a positive number"):
            refit(weight, inputs, np.ones(12, bool), ridge)
    inputs[0, 0] = np.nan
    with pytest.raises(DataError, match="curvature of a layer holds NaN"):
        kfac_order(weight, inputs, outputs, np.arange(12))
    with pytest.raises(DataError, match="gradients of gates hold NaN"):
        fisher_order(np.array([1.0, np.inf]))


def test_centring_takes_the_product_of_the_means_away():
    _, x, _ = layer()
    np.testing.assert_allclose(centred(x.T @ x / len(x), x.mean(0)), np.cov(x.T, bias=True), atol=1e-9)
