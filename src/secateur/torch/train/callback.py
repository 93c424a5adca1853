"""Callbacks of transformers' Trainer: Hold keeps zeros, Gradual adds zeros by a schedule, Bar shows progress."""

import contextlib
from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from secateur.host import Host
from secateur.plan import Plan
from secateur.schedule import Schedule


class Holding(TrainerCallback):
    """Base class of the callbacks that hold zeros while a Trainer trains."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Stop holding; no effect when nothing is held."""
        self._stack.close()


class Hold(Holding):
    """`Trainer(..., callbacks=[Hold(host, plan)])`: what the plan removes is zero throughout the training.

    The trainer must train `host.model`. Accumulation, schedulers, clipping and weight decay are supported. A training
    that ends in an exception does not reach `on_train_end`: call `close` then, or delete the callback.
    """

    def __init__(self, host: Host, plan: Plan) -> None:
        super().__init__(host)
        self._plan = plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start holding."""
        self.close()
        self._stack.enter_context(self._host.hold(self._plan))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop holding; the zeros are in place."""
        self.close()


class Bar(ProgressCallback):
    """The Trainer's progress bar on standard error, without its log lines on standard output."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show an empty bar that says what it counts."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say nothing."""


class Gradual(Holding):
    """Prunes during training: every few steps it decides a new plan at the sparsity of the schedule, and holds it.

    host: the host of the model that the trainer trains.
    decide: sparsity -> Plan, such as `lambda s: prune(host, magnitude, Element(), Global(s))`.
    schedule: step -> sparsity.
    every: number of steps from one decision to the next.

    `plan` is the last decision. A weight that was removed comes back only if a later decision keeps it, and then starts
    from zero. After a training that ends in an exception, call `close`.
    """

    def __init__(self, host: Host, decide: Callable[[float], Plan], schedule: Schedule, every: int = 10) -> None:
        super().__init__(host)
        self._decide, self._schedule, self._every = decide, schedule, every
        self._sparsity = -1.0
        self.plan = Plan()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide a new plan if the sparsity of the schedule has changed."""
        if state.global_step % self._every == 0 or self._sparsity < 0:  # the latter in a training that goes on
            self._move(self._schedule(state.global_step - state.global_step % self._every))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End at the sparsity that the schedule gives for the last step."""
        self._move(self._schedule(state.global_step))
        self.close()

    def close(self) -> None:
        """Stop holding, if anything is held; a later training starts with a new decision."""
        super().close()
        self._sparsity = -1.0

    def _move(self, sparsity: float) -> None:
        if sparsity == self._sparsity:
            return
        self._sparsity = sparsity
        self.plan = self._decide(sparsity)
        self._stack.close()
        self._stack.enter_context(self._host.hold(self.plan))
