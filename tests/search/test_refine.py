"""Refinement on true divergences that differ from the expected ones in a known way."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from secateur.search.choice import choose, expected, within
from secateur.search.refine import refine
from secateur.search.trial import key_of
from tests.search.fakes import cost_of, levels_of
from tests.search.test_choice import layered


class Fake:
    """True curves that are the expected ones times a factor of each axis; examples differ by noise of their own."""

    def __init__(self, levels, factors, noise=0.0, batches=4):
        self.levels, self.batches, self.noise = levels, batches, noise
        self.true = replace(
            levels, axes={n: replace(a, losses=a.losses * factors.get(n, 1)) for n, a in levels.axes.items()}
        )
        self.asked = set()

    def __len__(self):
        return self.batches

    def per_example(self, candidate, batches=None):
        self.asked.add(key_of(candidate))
        rng = np.random.default_rng(zlib.crc32(repr(key_of(candidate)).encode()))
        noise = self.noise * rng.normal(size=16 * self.batches)
        layers = sum(self.levels.layers[a][i] for a, gone in candidate.dropped.items() for i in gone)
        values = expected(self.true, candidate) + layers + np.linspace(0, 1, 16 * self.batches) + noise
        return values[: 16 * (batches or self.batches)]

    def divergence(self, candidate, batches=None):
        return float(self.per_example(candidate, batches).mean())

    def loss(self, candidate):
        return expected(self.true, candidate)


@pytest.fixture
def wrong():
    """Levels whose first two axes are really four times as bad, and the cost of half."""
    levels = levels_of([20] * 6, 4)
    return levels, cost_of(levels, 0.5, 4), Fake(levels, {"a0": 4.0, "a1": 4.0, "a5": 0.25})


def test_a_search_ends_near_the_optimum_and_within_the_cost(wrong):
    levels, cost, fake = wrong
    first, best = choose(levels, [cost]), fake.loss(choose(fake.true, [cost]))
    lines = []
    found = refine(first, levels, [cost], fake, seconds=1e9, most=300, say=lines.append)
    assert within(found, [cost])
    assert fake.loss(found) - best < 0.2 * (fake.loss(first) - best)
    assert f"divergence {fake.divergence(found):.4g} (was {fake.divergence(first):.4g})" in lines[-1]


def test_a_search_with_so_many_moves_depends_on_the_seed_alone(wrong):
    levels, cost, fake = wrong
    first = choose(levels, [cost])
    found = [refine(first, levels, [cost], fake, seconds=1e9, most=40, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_no_more_moves_are_measured_than_allowed(wrong):
    levels, cost, fake = wrong
    refine(choose(levels, [cost]), levels, [cost], fake, seconds=1e9, most=7)
    assert len(fake.asked) == 8


def test_noise_is_not_taken_for_a_gain():
    levels = levels_of([20] * 6, 4)
    cost = cost_of(levels, 0.5, 4)
    first = choose(levels, [cost])
    flat = Fake(replace(levels, axes={n: replace(a, losses=0 * a.losses) for n, a in levels.axes.items()}), {}, noise=1)
    assert refine(first, levels, [cost], flat, seconds=1e9, most=40, errors=4.0) == first
    assert refine(first, levels, [cost], flat, seconds=1e9, most=40, errors=0.0) != first


def test_a_layer_that_hardly_matters_is_dropped():
    levels, cost, inside, _ = layered(0.7)
    found = refine(choose(levels, [cost]), levels, [cost], Fake(levels, {}), inside=inside, seconds=1e9, most=60)
    assert found.dropped == {"layers": (1,)}
    assert within(found, [cost])
