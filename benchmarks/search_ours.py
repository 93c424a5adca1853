"""What secateur's automatic search finds within a cost, for the benchmarks that put it beside others.

The stages of `secateur.search.automatic` up to the choice and the removal: statistics, levels, choice, local search.
Nothing is healed, saved or timed. A quarter of the calibration rows are the search rows, so that ours sees no more rows
than the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from secateur.cost import parameters
from secateur.plan import Plan
from secateur.search.chooser import Chosen, Settings
from secateur.search.rows import Rows
from secateur.search.stages import Stages
from secateur.search.target import Limit, Target
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Examples, Task
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.host import TorchHost

SEARCH_SHARE = 4
"""One calibration row in so many is a search row."""
SEARCH_SECONDS = 60.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Searched:
    """host: the smaller model. plan: how it came about. chosen: sizes, order and ridge. seconds: CPU time of it all."""

    host: TorchHost
    plan: Plan
    chosen: Chosen
    seconds: float


def searched(
    host: TorchHost,
    task: Task,
    examples: Examples,
    limit: Limit,
    *,
    batch_size: int,
    seed: int = 0,
    say: Say = lambda text: None,
) -> Searched:
    """The smaller model of least divergence within a limit, from calibration rows without labels."""
    start = time.process_time()
    count = examples.count - examples.count // SEARCH_SHARE
    calibration, search = examples.take(count), after(examples, count)
    batches = [Batches(task, part, batch_size) for part in (calibration, search)]
    rows = Rows(calibration, batches[0], batches[1], batches[1], batch_size)
    with TemporaryDirectory() as work:
        settings = Settings(heal_seconds=0.0, search_seconds=SEARCH_SECONDS, seed=seed)
        stages = Stages(host, task, Target(limits=(limit,)), rows, Path(work), settings, say=say)
        chosen = stages.refined(stages.chosen(stages.costs), stages.costs)
        small, plan = stages.cut(chosen)
    return Searched(small, plan, chosen, time.process_time() - start)


def after(examples: Examples, count: int) -> Examples:
    """The rows behind the first `count`."""
    kept = [i for i, row in enumerate(examples.rows) if row >= count]
    return Examples(
        [examples.features[i] for i in kept],
        [examples.rows[i] - count for i in kept],
        None if examples.references is None else examples.references[count:],
        examples.count - count,
        examples.inputs[count:],
    )


def windows_as_examples(windows: torch.Tensor) -> Examples:
    """Windows of tokens (count, context) as rows of text-generation."""
    features = [{"input_ids": ids, "labels": ids} for ids in windows.tolist()]
    return Examples(features, range(len(windows)), list(windows[:, 1:].numpy()), len(windows))


def decoder(host: TorchHost, tokenizer: Any, windows: torch.Tensor, gone: int, seed: int, say: Say) -> Searched:
    """A decoder without `gone` of its parameters, from calibration windows."""
    task = TextGeneration(host.model, tokenizer)
    bound = 1 - gone / parameters(host.layout).total
    return searched(host, task, windows_as_examples(windows), Limit("params", bound), batch_size=1, seed=seed, say=say)


def sizes(host: TorchHost, plan: Plan, kind: str) -> Sequence[int]:
    """How many units each axis of a kind keeps."""
    return [len(plan.keep.get(axis.name, range(axis.size))) for axis in host.layout.of_kind(kind)]
