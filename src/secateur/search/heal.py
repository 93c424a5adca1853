"""Healing: a pruned model is trained with the dense model as teacher, in rounds, as long as search rows gain by it.

Labels do not count: the dense model has learnt from them, and a model that fits them anew moves away from it.

The weights of the best round stay; where no round is better than no training, those from before it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from secateur.errors import TrainingDivergedError
from secateur.metrics.evaluation import Evaluation, compare
from secateur.plan import Plan
from secateur.search.rows import Rows
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.torch.base.batches import to_device
from secateur.torch.host import TorchHost
from secateur.torch.train.distil_loss import distillation_loss
from secateur.training.fine_tune import fine_tune

LEAST, LEAST_STEPS = 0.1, 50
"""A round is worth its time when it has this part of an epoch, or so many steps."""
MOST_ROUNDS = 20


@dataclass(frozen=True)
class Round:
    """One round, or none: the model before healing has `epochs` 0.

    epochs, learning_rate: what it trained. loss: the mean loss of the training; None without any.
    metric: value of the main metric on the search rows. drop: how much it lost to the dense model.
    divergence: mean divergence from the dense model on the search rows. All three None where the training diverged.
    seconds: of training and evaluation.
    is_kept: whether it was the best so far.
    """

    epochs: float
    learning_rate: float
    loss: float | None
    metric: float | None
    drop: float | None
    divergence: float | None
    seconds: float
    is_kept: bool


@dataclass(frozen=True)
class Healed:
    """What healing did.

    metric: the name of the main metric. before: the model before it. rounds: in order.
    best: number of the round, from 1, whose weights stay; 0 for those from before.
    refused: why healing changed nothing, in a sentence; None where it did.
    seconds: of everything.
    """

    metric: str
    before: Round
    rounds: tuple[Round, ...]
    best: int
    refused: str | None
    seconds: float

    @property
    def after(self) -> Round:
        """The round whose weights stay."""
        return self.rounds[self.best - 1] if self.best else self.before

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Healed":
        """Read what `as_json` writes."""
        rounds = tuple(Round(**one) for one in data["rounds"])
        return Healed(**{**data, "before": Round(**data["before"]), "rounds": rounds})


def heal(
    host: TorchHost,
    dense: TorchHost,
    task: Task,
    rows: Rows,
    *,
    plan: Plan | None = None,
    seconds: float = 600.0,
    wanted: float | None = None,
    learning_rate: float = 1e-4,
    rounds: int = MOST_ROUNDS,
    seed: int = 0,
    reference: Reference | None = None,
    track: Track = silent,
) -> Healed:
    """Train `host.model` in place to answer as the dense model does.

    A round is an epoch, or the part of one that fits. A round that does not gain is undone, and the learning rate is
    then a third once; the next such round ends the healing. It also ends when the time is over, and when the drop is
    within `wanted` by one standard error. A round gains when the drop of the main metric falls and the rows tell the
    two apart, or, where they do not, when the divergence falls.

    plan: zeros to hold, in addition to those of `host.plan`.
    seconds: time to take, estimated from the steps on a few batches.
    rounds: the most rounds.
    reference: the dense model on `rows.search`, if it has run.
    """
    start = time.perf_counter()
    judge = _Judge(task, rows, reference or Reference(task, dense.model, rows.search, track), track)
    began = time.perf_counter()
    best = judge.of(host)
    measuring = time.perf_counter() - began
    before = judge.round(best, 0.0, 0.0, None, measuring, is_kept=True)
    epoch = step_seconds(host, dense, task, rows) * -(-len(rows.train.features) // rows.batch_size)
    done: list[Round] = []
    state, best_round, retried = _state(host), 0, False
    while len(done) < rounds and not judge.is_enough(best, wanted):
        part = min(1.0, (seconds - (time.perf_counter() - start) - measuring) / epoch)
        if part * len(rows.train.features) < min(LEAST * len(rows.train.features), LEAST_STEPS * rows.batch_size):
            break
        began = time.perf_counter()
        loss = _trained(
            host,
            dense,
            task,
            rows,
            plan=plan,
            epochs=part,
            learning_rate=learning_rate,
            seed=seed + len(done),
            progress=track,
        )
        now = None if loss is None else judge.of(host)
        gains = now is not None and _is_better(now, best)
        spent = time.perf_counter() - began
        done.append(judge.round(now, part, learning_rate, loss, spent, is_kept=gains))
        epoch = max(spent - measuring, 1e-3) / part
        if gains:
            assert now is not None
            best, best_round, state = now, len(done), _state(host)
            continue
        _restore(host, state)
        if retried:
            break
        learning_rate, retried = learning_rate / 3, True
    refused = None if best_round else _refusal(done, before, seconds, is_enough=judge.is_enough(best, wanted))
    return Healed(best.metric, before, tuple(done), best_round, refused, time.perf_counter() - start)


def short_heal(
    hosts: Sequence[TorchHost],
    dense: TorchHost,
    task: Task,
    rows: Rows,
    *,
    steps: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    reference: Reference | None = None,
    track: Track = silent,
) -> list[float]:
    """The divergence of each model on the search rows after so many steps on the same rows; the hosts stay as they are.

    Ranks candidates by what training makes of them. A training that diverges gives infinity.
    """
    judge = _Judge(task, rows, reference or Reference(task, dense.model, rows.search, track), track)
    found = []
    for host in hosts:
        other = host.copy()
        loss = _trained(
            other, dense, task, rows, learning_rate=learning_rate, seed=seed, arguments={"max_steps": steps}
        )
        divergence = None if loss is None else judge.of(other).kl
        found.append(float("inf") if divergence is None else divergence)
    return found


def step_seconds(host: TorchHost, dense: TorchHost, task: Task, rows: Rows, batches: int = 3) -> float:
    """About how long a step of healing takes: forward and backward pass of some batches; no weight changes."""
    picked = np.random.default_rng(0).permutation(len(rows.train.features))
    some = [rows.train.features[i] for i in picked[: batches * rows.batch_size]]
    sizes = sorted(some, key=task.length)  # batches of like lengths, as in training
    parts = [sizes[i : i + rows.batch_size] for i in range(0, len(sizes), rows.batch_size)]
    taken = []
    own_loss = task.loss if task.has_own_loss else None
    for part in [parts[0], *parts]:  # the first one warms up
        began = time.perf_counter()
        batch = to_device(task.collate(part), host.model)
        loss, _ = distillation_loss(host.model, dense.model, batch, task.divergence, own_loss, with_labels=False)
        loss.backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # else the clock stops before the device does
        taken.append((time.perf_counter() - began) * rows.batch_size / len(part))
        for parameter in host.model.parameters():
            parameter.grad = None
    return float(np.median(taken[1:])) * 1.1  # the optimizer


# -- parts ------------------------------------------------------------------------------------------------------------


class _Judge:
    """What models are worth on the search rows."""

    def __init__(self, task: Task, rows: Rows, reference: Reference, track: Track) -> None:
        self._task, self._rows, self._reference, self._track = task, rows, reference, track
        self._dense = reference.evaluation()

    def of(self, host: TorchHost) -> Evaluation:
        """The evaluation of a model."""
        return evaluate(self._task, host.model, self._rows.search, self._reference, self._track)

    def round(
        self,
        evaluation: Evaluation | None,
        epochs: float,
        learning_rate: float,
        loss: float | None,
        seconds: float,
        *,
        is_kept: bool,
    ) -> Round:
        """The record of a round; None stands for a training that diverged."""
        if evaluation is None:
            return Round(epochs, learning_rate, loss, None, None, None, seconds, is_kept)
        drop = compare(self._dense, evaluation).drop
        return Round(epochs, learning_rate, loss, evaluation.value, drop, evaluation.kl, seconds, is_kept)

    def is_enough(self, evaluation: Evaluation, wanted: float | None) -> bool:
        """Whether the drop is within what is wanted by one standard error."""
        if wanted is None:
            return False
        drop = compare(self._dense, evaluation)
        error = 0.0 if drop.interval is None else (drop.interval[1] - drop.interval[0]) / 4
        return drop.drop + error <= wanted


def _trained(
    host: TorchHost,
    dense: TorchHost,
    task: Task,
    rows: Rows,
    *,
    epochs: float = 1.0,
    progress: Track | bool = False,
    **rest: Any,
) -> float | None:
    """The mean loss of a training with the dense model as teacher; None where it diverged."""
    options = {"batch_size": rows.batch_size, "epochs": epochs, "progress": progress, **rest}
    options |= {"teacher": dense.model, "with_labels": False}
    try:
        return fine_tune(host, task, rows.train, **options)
    except TrainingDivergedError:
        return None


def _is_better(now: Evaluation, before: Evaluation) -> bool:
    """Whether a model is better by the main metric, or by the divergence where the rows do not tell them apart."""
    interval = compare(before, now).interval
    if interval is not None and (interval[0] > 0 or interval[1] < 0):
        return interval[1] < 0
    assert now.kl is not None
    assert before.kl is not None
    return now.kl < before.kl


def _state(host: TorchHost) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    model = host.model
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _restore(host: TorchHost, state: dict[str, torch.Tensor]) -> None:
    tensors = dict((*host.model.named_parameters(), *host.model.named_buffers()))
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)


def _refusal(rounds: Sequence[Round], before: Round, seconds: float, *, is_enough: bool) -> str:
    """Why healing changed nothing."""
    if is_enough:
        return f"the model was not trained: its drop of {before.drop:.4g} is within what is wanted"
    if not rounds:
        return f"the model was not trained: {seconds:.0f} s do not suffice for a round; give it more time or fewer rows"
    reached = [one.divergence for one in rounds if one.divergence is not None]
    least = f"{min(reached):.4g} at best after it" if reached else "infinite after it"
    return (
        f"the model keeps its weights, as no round of training made it better on the search rows (divergence "
        f"{before.divergence:.4g} before, {least})"
    )
