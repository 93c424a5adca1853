"""GradualPruning: a callback of `fit` that prunes while the model trains, along a schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from secateur import pruning
from secateur.budget import Budget, Global
from secateur.criteria import magnitude
from secateur.keras.hold import hold
from secateur.keras.host import KerasHost
from secateur.keras.naming import variables
from secateur.plan import Plan
from secateur.schedule import Schedule
from secateur.select import Element, Pattern


class GradualPruning(keras.callbacks.Callback):
    """`model.fit(..., callbacks=[GradualPruning(schedule=secateur.schedule.cubic(0.8, steps=500))])`.

    schedule: training step -> sparsity.
    budget: how the sparsity is spread, by default over all weights together.
    every: steps between two decisions.
    criterion, pattern, data, weights: as in `secateur.prune`; the criterion sees the weights of that step.
    plan: the last decision. The zeros are held after the training too, until `secateur.keras.release(model)`.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        every: int = 10,
        criterion: Callable[..., Any] = magnitude,
        pattern: Pattern | None = None,
        budget: Callable[[float], Budget] = Global,
        data: Any = None,
        weights: Sequence[str] | None = None,
        example: Any = None,
    ) -> None:
        super().__init__()
        self.schedule, self.every, self.criterion, self.data = schedule, every, criterion, data
        self.pattern = Element() if pattern is None else pattern
        self.budget, self.weights, self.example = budget, weights, example
        self.plan = Plan()
        self._host: KerasHost | None = None
        self._step = 0
        self._sparsity = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Put constraints in place before the training step is compiled; nothing is zero yet."""
        self._host = host = KerasHost(self.model, self.example)
        self._step, self._sparsity = 0, 0.0
        names = list(host.layout.params)
        by_name = variables(self.model)
        free = {n: by_name[n] for n in names if not hasattr(by_name[n].constraint, "mask") and by_name[n].trainable}
        hold(self.model, by_name, {n: np.ones(tuple(v.shape), dtype=bool) for n, v in free.items()})

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Decide anew where the schedule has moved."""
        if self._step % self.every == 0:
            self._move(self.schedule(self._step))
        self._step += 1

    def on_train_end(self, logs: Any = None) -> None:
        """Prune to the sparsity of the schedule at the last step."""
        self._move(self.schedule(self._step))

    def _move(self, sparsity: float) -> None:
        if self._host is None or sparsity == self._sparsity:
            return
        self._sparsity = sparsity
        self.plan = pruning.prune(
            self._host, self.criterion, self.pattern, self.budget(sparsity), self.data, weights=self.weights
        )
        if self._host.plan is not None:
            self.plan = self._host.plan.merge(self.plan)
        hold(self.model, variables(self.model), self._host.masks(self.plan))
