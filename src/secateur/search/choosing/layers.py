"""Whole layers against widths: how many layers go, and which, before the widths of the rest are chosen."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from secateur.errors import PlanError
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import Inside, choose, expected
from secateur.search.costs import Cost
from secateur.search.levels import Levels

TRIED = 3
"""Layers that are measured for each one that goes."""


def with_layers(
    levels: Levels,
    costs: Sequence[Cost],
    divergence: Callable[[Candidate], float],
    *,
    inside: Inside | None = None,
    best: int = 3,
    tried: int = TRIED,
) -> list[Candidate]:
    """Choices with 0, 1, 2, ... layers gone, the `best` of them by expected divergence, the best first.

    Layers go one at a time: the `tried` of least divergence by `levels.layers` are measured together with those that
    are gone, and the best one goes. The expected divergence of a choice is the measured one of its layers plus the
    expected one of its widths; the latter is scaled by what the choice without a layer measures. The walk ends when
    this has risen twice, or when the layers alone meet the bounds.

    divergence: measures a candidate.

    Raises PlanError when no bound is met however many layers go.
    """
    found: list[tuple[float, Candidate]] = []
    refused: PlanError | None = None
    gone: dict[str, tuple[int, ...]] = {}
    scale, measured, risen = 1.0, 0.0, 0
    while risen < 2:
        try:
            candidate = choose(levels, costs, dropped=gone, inside=inside)
        except PlanError as error:
            refused = error
        else:
            widths = expected(levels, candidate)
            if not found and widths > 0:
                # Curves are too low by a factor that is much the same for all widths; layers are measured.
                scale = max(divergence(candidate) - measured, 0.0) / widths or 1.0
            total = measured + scale * widths
            risen = risen + 1 if found and total > found[-1][0] else 0
            found.append((total, candidate))
            if not candidate.kept:
                break
        following = _next(levels, costs, divergence, gone, tried)
        if following is None:
            break
        measured, gone = following
    if not found:
        assert refused is not None
        raise refused
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])[:best]]


def _next(
    levels: Levels,
    costs: Sequence[Cost],
    divergence: Callable[[Candidate], float],
    gone: Mapping[str, tuple[int, ...]],
    tried: int,
) -> tuple[float, dict[str, tuple[int, ...]]] | None:
    """One more layer gone, and what the model without these layers measures; None when no layer is left to go."""
    left = [
        (float(loss), axis, layer)
        for axis, losses in levels.layers.items()
        if any(axis in cost.layers for cost in costs) and len(gone.get(axis, ())) < len(losses) - 1
        for layer, loss in enumerate(losses)
        if layer not in gone.get(axis, ()) and np.isfinite(loss)
    ]
    measured = []
    for _, axis, layer in sorted(left)[:tried]:
        more = {**gone, axis: tuple(sorted((*gone.get(axis, ()), layer)))}
        measured.append((divergence(Candidate(dropped=more)), axis, more))
    if not measured:
        return None
    value, _, more = min(measured, key=lambda one: one[0])
    return value, more
