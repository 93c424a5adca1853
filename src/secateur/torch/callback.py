"""Callbacks of transformers' Trainer: Hold keeps zeros, Bar shows progress and prints nothing else."""

import contextlib
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from secateur.host import Host
from secateur.plan import Plan


class Hold(TrainerCallback):
    """`Trainer(..., callbacks=[Hold(host, plan)])`: what the plan removes is zero throughout the training.

    The trainer must train `host.model`. Accumulation, schedulers, clipping and weight decay are all fine. A training
    that ends in an exception does not reach `on_train_end`: call `close` then, or let go of the callback.
    """

    def __init__(self, host: Host, plan: Plan) -> None:
        self._host, self._plan = host, plan
        self._stack = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start holding."""
        self._stack.close()
        self._stack.enter_context(self._host.hold(self._plan))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop holding; the zeros are in place."""
        self.close()

    def close(self) -> None:
        """Stop holding, if it still does."""
        self._stack.close()


class Bar(ProgressCallback):
    """The Trainer's progress bar on standard error, without its log lines on standard output."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say nothing."""
