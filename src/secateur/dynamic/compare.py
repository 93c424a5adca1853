"""How good schedules of tokens are on rows of a task, beside what needs no schedule at the same work: texts cut short,
and tokens left out at random.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.dynamic.tokens import Wanted, merge_tokens, prune_tokens, sites_of
from secateur.metrics.evaluation import Evaluation
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Task
from secateur.token_schedule import TokenSchedule
from secateur.torch.host import TorchHost
from secateur.torch.tokens.install import schedule_on


@dataclass(frozen=True)
class Compared:
    """One row: a model and how far it is from the dense one.

    work: share of the dense model's work by tokens, at the longest text.
    length: tokens of the longest text.
    """

    name: str
    work: float
    length: int
    evaluation: Evaluation
    schedule: TokenSchedule | None = None

    @property
    def agreement(self) -> float | None:
        """The share of rows that get the dense model's answer."""
        flips = self.evaluation.flips
        return None if flips is None else 1 - flips


def compare(
    task: Task,
    host: TorchHost,
    batches: Batches,
    schedules: Mapping[str, Wanted],
    *,
    merge: bool = False,
    baselines: bool = True,
    seed: int = 0,
    track: Track = silent,
) -> list[Compared]:
    """Dense, each schedule by name, and where `baselines` say so the two beside it at the same work.

    host: without a schedule. task: of its model. batches: rows that nothing was chosen on.
    merge: merge tokens in place of leaving them out; images cannot be cut short, and nothing stands beside them.
    seed: of the random tokens.

    Raises ModelError as `prune_tokens` does.
    """
    reference = Reference(task, host.model, batches, track)
    length = max(task.length(feature) for feature in batches.examples.features)
    found = sites_of(host)
    rows = [Compared("dense", 1.0, length, reference.evaluation())]
    make = merge_tokens if merge else prune_tokens
    for name, wanted in schedules.items():
        faster = make(host, wanted, found=found)
        schedule = schedule_on(faster.model)
        assert schedule is not None
        work = schedule.work(length)
        scored = evaluate(task, faster.model, batches, reference, track)
        rows.append(Compared(name, work, length, scored, schedule))
        if not baselines or min(schedule.keep) == 100:
            continue
        if found.takes_padding:
            short = round(work * length)
            with cut_short(host.model, short):
                scored = evaluate(task, host.model, batches, reference, track)
            rows.append(Compared(f"{name}: texts cut to {short} tokens", work, length, scored))
        if not merge:
            noise = prune_tokens(host, replace(schedule, method="random"), found=found)
            torch.manual_seed(seed)
            scored = evaluate(task, noise.model, batches, reference, track)
            rows.append(Compared(f"{name}: random tokens", work, length, scored))
    return rows


@contextlib.contextmanager
def cut_short(model: nn.Module, length: int) -> Iterator[None]:
    """A context in which a model reads at most that many tokens of a text: the first ones, and the last one."""

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.get(str(getattr(module, "main_input_name", "input_ids")))
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] <= length:
            return args, kwargs
        mask = kwargs.get("attention_mask")
        ends = (torch.full_like(ids[:, 0], ids.shape[1]) if mask is None else mask.sum(1)) - 1
        last = torch.arange(length, device=ids.device).expand(len(ids), -1).clone()
        last[:, -1] = torch.where(ends >= length, ends, length - 1)
        return args, {
            name: value.gather(1, last) if isinstance(value, torch.Tensor) and value.shape == ids.shape else value
            for name, value in kwargs.items()
        }

    handle = model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def as_table(rows: Sequence[Compared]) -> list[str]:
    """The rows as lines of a Markdown table."""
    metric = rows[0].evaluation.metric
    lines = [f"| | work | {metric} | agreement | {rows[0].evaluation.divergence} |", "|---|---|---|---|---|"]
    for row in rows:
        scored = row.evaluation
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        kl = "" if scored.kl is None else f"{scored.kl:.4f}"
        lines.append(f"| {row.name} | {row.work:.2f} | {scored.values[metric]:.4f} | {agreement} | {kl} |")
    return lines
