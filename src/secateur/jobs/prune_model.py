"""The main job, for a model of any task: prune, verify, fine-tune, shrink, save, reload, and measure the result."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur.budget import Budget, Global, Uniform
from secateur.check import verify
from secateur.cost import macs, parameters, side_by_side
from secateur.errors import PlanError
from secateur.files import new_folder
from secateur.jobs.schedule_tokens import Wanted
from secateur.metrics.evaluation import compare
from secateur.metrics.outcome import Outcome
from secateur.plan import Plan, resized_masks
from secateur.pruning import Criterion, check_weights, default_weights, needs_of, prune
from secateur.records.model import model_type_of, weight_bytes
from secateur.records.outcome import record_of
from secateur.records.provenance import provenance_of
from secateur.schedule import cubic
from secateur.schemas.record import DataFile
from secateur.select import NM, Pattern, Unit
from secateur.tasks.base.batches import Batches, OwnLabels
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Examples, Task
from secateur.torch.files.hashes import add_record
from secateur.torch.files.saving import save
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model
from secateur.torch.reloaded import folder_bytes, reload_gap, tensor_bytes
from secateur.torch.tokens.install import schedule_on
from secateur.torch.train.callback import Gradual
from secateur.training import ranks
from secateur.training.fine_tune import fine_tune, training_arguments


@dataclass(frozen=True)
class Data:
    """The data of a job.

    task: what the model is for; its processor is saved with the model.
    train: encoded training rows.
    calibration: batches of a part of the training rows.
    test: batches of other rows.
    batch_size: rows in a batch of fine-tuning.
    files: where the rows come from, for the record.
    """

    task: Task
    train: Examples
    calibration: Batches
    test: Batches
    batch_size: int = 32
    files: Sequence[DataFile] = ()


@dataclass(frozen=True)
class Stage:
    """One pruning decision; several stages, one after the other, make one plan.

    criterion: how to score.
    pattern: what to remove.
    budget: how much to remove.
    weights: names of the weights to prune; None for the default.
    """

    criterion: Criterion
    pattern: Pattern
    budget: Budget | float | None
    weights: Sequence[str] | None = None

    @property
    def title(self) -> str:
        """The name of its bar."""
        return f"{self.criterion.__name__} for {self.pattern}"


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning after pruning.

    epochs: passes over the training rows; 0 for no fine-tuning.
    learning_rate: the largest learning rate.
    seed: seed of the order of the rows and of dropout.
    distil: whether to learn from the dense model, in addition to the labels where there are any.
    gradual: whether to prune along a cubic schedule over the first `RAMP` of the steps, ranking the weights again as
        they change (element patterns, magnitude), instead of all at once.
    arguments: more fields of transformers' TrainingArguments, which win over those above.
    """

    epochs: float = 0.0
    learning_rate: float = 1e-4
    seed: int = 0
    distil: bool = False
    gradual: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


RAMP = 0.6
RAMP_START = 0.5
"""Gradual pruning begins at this share of the final sparsity and reaches it at `RAMP` of the steps."""


def decide(host: TorchHost, steps: Sequence[Stage], calibration: Iterable[Any], track: Track = silent) -> Plan:
    """The plan of all stages, each scored on the unchanged model, merged with what was pruned before it was opened."""
    plan = host.plan or Plan()
    for step in steps:
        data = track(calibration, step.title)
        plan = plan.merge(prune(host, step.criterion, step.pattern, step.budget, data, weights=step.weights))
    return plan.check(host.layout)


def calibration_of(host: TorchHost, data: Data) -> Sequence[Any]:
    """Calibration batches with labels: those of the data, or the dense model's own answers where there are none."""
    if data.calibration.are_labelled:
        return data.calibration
    return OwnLabels(data.task, data.calibration, host.model)


def gradually(host: TorchHost, steps: Sequence[Stage], tuning: Tuning, data: Data) -> Gradual:
    """The callback that prunes `host` by the stages while it trains; PlanError when they need more than weights."""
    budgets = [_gradual_budget(step) for step in steps]

    def decide_at(progress: float) -> Plan:
        plan = host.plan or Plan()
        for step, final in zip(steps, budgets, strict=True):
            budget = replace(final, sparsity=final.sparsity * progress)
            plan = plan.merge(prune(host, step.criterion, step.pattern, budget, weights=step.weights))
        return plan

    given = {"num_train_epochs": tuning.epochs, "per_device_train_batch_size": data.batch_size, **tuning.arguments}
    with tempfile.TemporaryDirectory() as scratch:
        count = training_arguments(len(data.train.features), {"output_dir": scratch, **given}).max_steps
    return Gradual(host, decide_at, cubic(1.0, round(RAMP * count), start=RAMP_START), every=max(1, count // 25))


def _gradual_budget(step: Stage) -> Uniform | Global:
    """The budget of a stage; PlanError when the stage cannot be pruned gradually."""
    by_weight = not isinstance(step.pattern, Unit | NM) and needs_of(step.criterion) == ["weight"]
    if by_weight and isinstance(step.budget, Uniform | Global):
        return step.budget
    raise PlanError(
        "gradual pruning ranks the weights again as they change: it takes the criterion magnitude, an element "
        f"or block pattern, and a uniform or global sparsity, not {step.criterion.__name__} with {step.pattern}"
    )


def run(
    name: str,
    host: TorchHost,
    steps: Sequence[Stage],
    data: Data,
    tuning: Tuning,
    output: Path | None = None,
    *,
    reference: Reference | None = None,
    overwrite: bool = False,
    track: Track = silent,
    save_options: dict[str, Any] | None = None,
    tokens: Wanted | None = None,
) -> Outcome:
    """Do the whole job on a copy of the host; `host` itself stays dense.

    output: folder to save to, with the record of the model; None to save nothing.
    reference: the dense model on the test batches, if it has run.
    track: shows progress.
    save_options: further arguments of `secateur.torch.files.saving.save`.
    tokens: the schedule of tokens that the pruned and fine-tuned model gets last.

    Under `torchrun` the first process calls this and the others `follow`.

    Raises:
        VerifyError: when the masked and the shrunk model differ.
        ModelError: when the reloaded model differs from the saved model, or `tokens` cannot be taken away. In all these
            cases nothing is written.
    """
    began = time.perf_counter()
    check_weights(host)
    if tokens is not None:
        tokens.on(host)  # so that a model that cannot have it is refused before the work
    task = data.task
    if reference is None:
        reference = Reference(task, host.model, data.test, track)
    dense_macs = macs(host.layout)
    plan = decide(host, steps, calibration_of(host, data), track)
    verdict = verify(host, plan, data.test)
    small = host.copy()
    linears = default_weights(host.layout)
    small.apply(plan)
    pruned = evaluate(task, small.model, data.test, reference, track)
    small.resize(plan)
    tuned = None
    if tuning.epochs > 0:
        ranks.shared(plan)
        small, plan = _tune(host, small, steps, data, tuning, plan, progress=track)
        tuned = evaluate(task, small.model, data.test, reference, track)
    shortened = None
    if tokens is not None:
        small = tokens.on(small)
        shortened = evaluate(task, small.model, data.test, reference, track)
    dense = reference.evaluation()
    count = parameters(host.layout, plan)
    outcome = Outcome(
        name=name,
        dense=dense,
        pruned=pruned,
        tuned=tuned,
        drop=compare(dense, shortened or tuned or pruned),
        total=count.total,
        nonzero=count.nonzero,
        macs_ratio=macs(small.layout) / dense_macs if dense_macs else None,
        difference=verdict.difference,
        inexact=verdict.inexact,
        provenance=dict(plan.provenance),
        schedule=schedule_on(small.model),
        shortened=shortened,
    )
    if output is None:
        return outcome
    fresh = None if hasattr(host.model, "save_pretrained") else copy.deepcopy(host.model)
    with new_folder(output, overwrite=overwrite) as temporary:
        small.save(temporary, plan, overwrite=True, **task.companions, **(save_options or {}))
        outcome = reloaded(outcome, small, temporary, data.test, linears, fresh)
        record = record_of(
            outcome,
            host.layout,
            plan,
            model_type=model_type_of(host.model),
            bytes=weight_bytes(temporary),
            dense_bytes=weight_bytes(host.source),
            provenance=provenance_of(seconds=time.perf_counter() - began, seed=tuning.seed, data=data.files),
        )
        add_record(record, temporary)
        outcome = replace(outcome, folder=str(output), bytes=folder_bytes(temporary))
    return outcome


def follow(host: TorchHost, steps: Sequence[Stage], data: Data, tuning: Tuning) -> None:
    """What the other processes of `torchrun` do while the first one runs `run`: prune by its plan, and train along."""
    if tuning.epochs <= 0:
        return
    plan = ranks.shared(Plan())
    small = host.copy()
    small.apply(plan)
    small.resize(plan)
    _tune(host, small, steps, data, tuning, plan, progress=False)


def _tune(
    dense: TorchHost,
    small: TorchHost,
    steps: Sequence[Stage],
    data: Data,
    tuning: Tuning,
    plan: Plan,
    *,
    progress: Track | bool,
) -> tuple[TorchHost, Plan]:
    """Fine-tune `small` with its zeros held, or a copy of `dense` that is pruned gradually; the model and its plan."""
    gradual, zeros = None, None
    if plan.masks and not tuning.gradual:
        zeros = resized_masks(dense.layout, plan)
    if tuning.gradual:
        small = dense.copy()
        gradual = gradually(small, steps, tuning, data)
    fine_tune(
        small,
        data.task,
        data.train,
        plan=zeros,
        epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        batch_size=data.batch_size,
        seed=tuning.seed,
        teacher=dense.model if tuning.distil else None,
        callbacks=[] if gradual is None else [gradual],
        progress=progress,
        arguments=tuning.arguments,
    )
    if gradual is not None:
        plan = replace(gradual.plan.check(dense.layout), provenance={**plan.provenance, "gradual": True})
        small.apply(plan)
    return small, plan


def reloaded(
    outcome: Outcome,
    host: TorchHost,
    folder: Path,
    test: Batches,
    linears: Sequence[str],
    fresh: nn.Module | None = None,
) -> Outcome:
    """Load the saved model and compare it with the model in memory; ModelError unless both give the same numbers.

    fresh: a module like the dense one, which a plain PyTorch module is loaded into.
    """
    gap = reload_gap(host, folder, test[0], fresh)
    return replace(
        outcome,
        folder=str(folder),
        bytes=folder_bytes(folder),
        linear_bytes=tensor_bytes(folder, linears),
        reload_difference=gap,
    )


def compare_latency(
    folders: dict[str, Path], size: tuple[int, int] = (8, 64), *, threads: int = 1, repeats: int = 40
) -> dict[str, float]:
    """Median seconds of one forward pass of each saved text model, run alternately in a new process.

    size: (batch, tokens) of random ids without padding.
    threads: number of threads.
    repeats: number of measured passes of each model.

    A process that has trained keeps freed memory, which spares the larger model page faults that it has when deployed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(
            _latency_here, {name: str(f) for name, f in folders.items()}, size, threads, repeats
        ).result()


def _latency_here(folders: dict[str, str], size: tuple[int, int], threads: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    models: dict[str, Any] = {name: load_model(folder) for name, folder in folders.items()}
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call(model: Any) -> Callable[[], object]:
        def forward() -> object:
            with torch.inference_mode():
                return model(**batch)

        return forward

    return side_by_side({name: call(model) for name, model in models.items()}, repeats=repeats)


def save_dense(host: TorchHost, folder: Path, task: Task, *, overwrite: bool = False) -> None:
    """Save the unpruned model beside the pruned models."""
    save(host.model, folder, overwrite=overwrite, **task.companions)
