"""Levels and costs made up by a seed, and the exact choice by dynamic programming."""

import numpy as np

from secateur.search.candidate import Candidate
from secateur.search.costs import Cost
from secateur.search.levels import AxisLevels, Levels
from secateur.search.target import Limit


def curve(rng, size):
    """A loss over the number of units that are gone: from 0 upwards, by steps of very unlike sizes."""
    steps = np.sort(rng.lognormal(0, 2, size)) if rng.random() < 0.7 else rng.lognormal(0, 1, size)
    return np.concatenate([[0.0], np.cumsum(steps)]) * rng.lognormal(0, 1) / size


def levels_of(sizes, seed=0, layers=None):
    """Levels with axes a0, a1, ... of these sizes."""
    rng = np.random.default_rng(seed)
    axes = {f"a{i}": AxisLevels(f"a{i}", "ffn", rng.permutation(n), curve(rng, n)) for i, n in enumerate(sizes)}
    return Levels("kfac", axes, {} if layers is None else {"layers": np.array(layers, dtype=float)})


def cost_of(levels, bound, seed=0, quantity="macs", dense=1.0, weights=None, steps=1, layers=0.0):
    """A cost in whole parts of `dense`: a unit costs 1, 2 or 3 of them, in steps of `steps` units."""
    rng = np.random.default_rng(seed)
    units = {name: int(rng.integers(1, 4)) if weights is None else weights for name in levels.axes}
    whole = sum(units[name] * axis.size for name, axis in levels.axes.items())
    curves = {}
    for name, axis in levels.axes.items():
        stepped = np.ceil(np.arange(axis.size + 1) / steps) * steps
        curves[name] = units[name] * (np.minimum(stepped, axis.size) - axis.size) / whole
    allowed = {name: np.arange(1, axis.size + 1) for name, axis in levels.axes.items()}
    of_layers = {"layers": np.full(len(levels.axes), -layers)} if layers else {}
    return Cost(Limit(quantity, bound), dense * whole, curves, allowed, of_layers)


def exact(levels, cost):
    """The least expected divergence within the bound, by dynamic programming over whole parts of the cost."""
    whole = round(cost.dense)
    room = int(np.ceil(whole * (1 - cost.bound) - 1e-6))
    best = np.full(room + 1, np.inf)  # least loss when at least so many parts are gone
    best[0] = 0.0
    for name, axis in levels.axes.items():
        new = np.full(room + 1, np.inf)
        for count in cost.allowed[name]:
            gone = round(-cost.curves[name][count] * whole)
            reached = np.minimum(np.arange(room + 1) + gone, room)
            np.minimum.at(new, reached, best + axis.losses[axis.size - count])
        best = new
    return float(best[room])


def loss(levels, candidate: Candidate):
    """The expected divergence of a candidate, added up by hand."""
    return sum(levels.axes[a].losses[len(levels.axes[a].order) - n] for a, n in candidate.kept.items())
