"""The parts of a record that say what a model is worth: its quality, the steps on the way there, and curves."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.schemas.record import Curve, Parity, Quality, Stage


def quality_of(drop: Drop, evaluation: Evaluation) -> Quality | None:
    """The quality of a model; None where the main metric is NaN or infinite for one of the two.

    drop: from the dense model. evaluation: of the model itself, on the same rows.
    """
    if not are_finite(drop.dense, drop.pruned, drop.drop):
        return None
    has_interval = drop.interval is not None and are_finite(*drop.interval)
    return Quality(
        metric=drop.metric,
        is_higher_better=evaluation.main is None or evaluation.main.is_higher_better,
        dense=drop.dense,
        pruned=drop.pruned,
        drop=drop.drop,
        interval=list(drop.interval) if drop.interval is not None and has_interval else None,
        rows=drop.rows,
        is_against_dense=evaluation.is_against_dense,
        divergence_name=evaluation.divergence,
        divergence=finite(evaluation.kl),
        flips=evaluation.flips,
    )


def stages_of(evaluations: Iterable[tuple[str, Evaluation | None]]) -> list[Stage]:
    """A stage for each evaluation that there is, by the name of the step."""
    return [
        Stage(name=name, value=found.value, divergence=finite(found.kl))
        for name, found in evaluations
        if found is not None and are_finite(found.value)
    ]


def curve_of(name: str, x: str, y: str, points: Iterable[tuple[float, float | None]]) -> list[Curve]:
    """A curve of the points that were measured, in a list; an empty list where there are fewer than two.

    x, y: what the numbers are, with their unit.
    """
    kept = [[float(a), float(b)] for a, b in points if b is not None and are_finite(a, b)]
    return [Curve(name=name, x=x, y=y, points=kept)] if len(kept) > 1 else []


def parity_of(runtime: str, compared: Mapping[str, Any] | None) -> list[Parity]:
    """How far an artefact is from the framework's model, in a list; an empty list where that was not compared.

    compared: `parity` in the description of the artefact, with `relative_error`, `tolerance` and `examples`.
    """
    error, bound, inputs = ((compared or {}).get(name) for name in ("relative_error", "tolerance", "examples"))
    if not isinstance(error, float) or not isinstance(bound, float) or not are_finite(error, bound):
        return []
    return [Parity(runtime=runtime, difference=error, bound=bound, inputs=inputs if isinstance(inputs, int) else None)]


def finite(value: float | None) -> float | None:
    """The number itself, or None for NaN and infinity, which no JSON file holds."""
    return value if value is not None and are_finite(value) else None


def are_finite(*values: float) -> bool:
    """Whether none of the numbers is NaN or infinite."""
    return all(map(math.isfinite, values))


def in_words(drop: Drop) -> str:
    """A drop in a sentence without a full stop: the values, the drop, and its 95% interval."""
    interval = "" if drop.interval is None else f", 95% [{drop.interval[0]:+.4f}, {drop.interval[1]:+.4f}]"
    return f"{drop.metric} {drop.dense:.4f} -> {drop.pruned:.4f}: drop {drop.drop:+.4f}{interval}"
