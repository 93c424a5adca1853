"""Tasks of lm-evaluation-harness (EleutherAI) on a language model and on the dense one, with the paired difference.

Tasks are the user's own YAML files in a folder, or those of the harness, which fetches their rows from the hub.
"""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import DataError, SecateurError
from secateur.jobs.language.rows import Models
from secateur.scores import interval_of
from secateur.torch.data.text_rows import load_tokenizer

BATCH = 8
"""Requests that run at once."""


@dataclass(frozen=True)
class Tasks:
    """What to run. names: of tasks. path: a folder of YAML files with the tasks; None for those of the harness.
    limit: rows of each task; None for all."""

    names: Sequence[str]
    path: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    rows: how many were asked. value, stderr: of the model, as the harness has them.
    dense, dense_stderr: of the dense model. delta: mean over rows of the model's value minus the dense model's.
    interval: of delta, 95% (paired, normal); None where a row has no number of its own.
    """

    task: str
    metric: str
    rows: int
    value: float
    stderr: float | None
    dense: float | None = None
    dense_stderr: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None


def check(tasks: Tasks) -> None:
    """DataError for a folder of tasks that is not there, SecateurError where the harness is not installed."""
    if tasks.path is not None and not tasks.path.is_dir():
        raise DataError(f"no folder of tasks at {tasks.path}; pass one that holds their YAML files")
    if importlib.util.find_spec("lm_eval") is None:
        raise SecateurError("lm_eval is not installed; `pip install 'secateur[lm-eval]'`")


def run_tasks(models: Models, tasks: Tasks) -> list[TaskScore]:
    """Run tasks on the model, and on the dense one where there is one; one model is in memory at a time.

    Raises DataError, in one sentence, for a task that the harness cannot run, and as `check`.
    """
    check(tasks)
    own = _evaluated(models, models.model, tasks)
    dense = None if models.reference is None else _evaluated(models, models.reference, tasks)
    return [score for task in own["samples"] for score in _scores(task, own, dense)]


def _evaluated(models: Models, source: str, tasks: Tasks) -> Mapping[str, Any]:
    """What the harness says of one model: results and samples by task."""
    import lm_eval  # optional: the extra lm-eval
    from lm_eval.models.huggingface import HFLM  # optional
    from lm_eval.tasks import TaskManager  # optional

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = models.load(source), load_tokenizer(source, **models.options)
    try:
        manager = TaskManager(
            include_path=None if tasks.path is None else str(tasks.path), include_defaults=tasks.path is None
        )
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            bootstrap_iters=1000,
        )
    except SecateurError:
        raise
    except Exception as error:  # a task is code and data of somebody else's
        words = " ".join(str(error).split())[:300]
        raise DataError(f"lm_eval could not run {', '.join(tasks.names)}: {type(error).__name__}: {words}") from error
    assert found is not None
    return found


def _scores(task: str, own: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[TaskScore]:
    """The metrics of one task."""
    rows = _by_row(own, task)
    scores = []
    for key, value in own["results"][task].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = f"{metric}_stderr,{kind}"
        count = len({row for row, given in rows if given == kind})
        score: dict[str, Any] = {"stderr": _number(own["results"][task].get(error))}
        if dense is not None:
            score |= {
                "dense": _number(dense["results"][task].get(key)),
                "dense_stderr": _number(dense["results"][task].get(error)),
                **_paired(rows, _by_row(dense, task), metric, kind),
            }
        name = metric if kind == "none" else f"{metric} ({kind})"
        scores.append(TaskScore(task, name, count, float(value), **score))
    return scores


def _by_row(found: Mapping[str, Any], task: str) -> dict[tuple[Any, str], Mapping[str, Any]]:
    """(row, filter) -> what the harness keeps of it."""
    return {(sample["doc_id"], sample["filter"]): sample for sample in found["samples"][task]}


def _paired(
    own: Mapping[tuple[Any, str], Mapping[str, Any]],
    dense: Mapping[tuple[Any, str], Mapping[str, Any]],
    metric: str,
    kind: str,
) -> dict[str, Any]:
    """The mean difference with its interval; nothing where a row has no number."""
    differences = []
    for key in (key for key in own if key[1] == kind):
        value, other = _number(own[key].get(metric)), _number(dense.get(key, {}).get(metric))
        if value is None or other is None:
            return {}
        differences.append(value - other)
    if not differences:
        return {}
    return {"delta": float(np.mean(differences)), "interval": interval_of(np.array(differences))}


def _number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None
