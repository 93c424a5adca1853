"""The textbook lines: `prune(model, threshold=0.1)`, then `compile` and `fit` as ever."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from secateur import pruning
from secateur.budget import Budget, Global, Threshold
from secateur.criteria import magnitude
from secateur.errors import PlanError
from secateur.keras.hold import hold
from secateur.keras.hold import release as _release
from secateur.keras.host import KerasHost
from secateur.keras.naming import variables
from secateur.select import NM, Element, Pattern


def prune(
    model: keras.Model,
    threshold: float | None = None,
    *,
    sparsity: float | None = None,
    criterion: Callable[..., Any] = magnitude,
    pattern: Pattern | None = None,
    data: Iterable[Any] | None = None,
    weights: Sequence[str] | None = None,
    example: Any = None,
    loss: Any = None,
) -> keras.Model:
    """Set weights to zero and hold them, and earlier zeros, at zero through every later `fit`; returns the model.

    threshold: weights that score this or less become zero.
    sparsity: or the share of all weights together that becomes zero.
    pattern: `Element()` (default), `NM`, `Block`, or `Unit`, whose units are zeroed, not removed.
    criterion, data, weights, loss: as in `secateur.prune` and `secateur.open`.

    Raises PlanError unless exactly one of threshold and sparsity is passed (neither for N:M).
    """
    pattern = Element() if pattern is None else pattern
    host = KerasHost(model, example, loss=loss)
    plan = pruning.prune(host, criterion, pattern, _budget(pattern, threshold, sparsity), data, weights=weights)
    hold(model, variables(model), host.masks(plan if host.plan is None else host.plan.merge(plan)))
    return model


def _budget(pattern: Pattern, threshold: float | None, sparsity: float | None) -> Budget | None:
    if isinstance(pattern, NM):
        if threshold is not None or sparsity is not None:
            raise PlanError(f"pattern {pattern} says itself how much goes; leave out threshold and sparsity")
        return None
    if (threshold is None) == (sparsity is None):
        raise PlanError("how much? pass either threshold=0.1 or sparsity=0.5")
    return Threshold(threshold) if threshold is not None else Global(float(sparsity or 0.0))


def release(model: keras.Model) -> keras.Model:
    """Stop holding zeros: they stay until the next training step may move them. Returns the same model."""
    _release(model, variables(model))
    return model
