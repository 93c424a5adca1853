"""Callbacks of transformers' Trainer: Hold keeps zeros, Gradual adds zeros by a schedule, Bar shows progress."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

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


class Bar(TrainerCallback):
    """Shows the steps of a training.

    track: (items, description) -> the same items, with a bar; that of tqdm when left out.
    """

    def __init__(self, track: Callable[[Iterable[Any], str], Iterable[Any]] | None = None) -> None:
        self._track = track or tqdm
        self._steps: Iterator[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show an empty bar that says what it counts."""
        self.close()
        if state.is_world_process_zero:
            self._steps = iter(self._track(range(state.global_step, state.max_steps), "training"))
            next(self._steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show one step more."""
        if self._steps is not None:
            next(self._steps, None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.close()

    def close(self) -> None:
        """End the bar; it may end twice."""
        steps, self._steps = self._steps, None
        end = getattr(steps, "close", None)
        if end is not None:
            end()


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
