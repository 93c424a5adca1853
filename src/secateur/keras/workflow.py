"""The main job on a Keras classifier with arrays as data: prune, verify, fine-tune, shrink, save, reload, measure."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from secateur.budget import Budget, Global, Uniform
from secateur.check import check_reloaded, verify
from secateur.cost import macs, parameters
from secateur.errors import DataError, ModelError, PlanError
from secateur.files import new_folder
from secateur.keras import files
from secateur.keras.batches import floats
from secateur.keras.batches import run as run_model
from secateur.keras.callback import GradualPruning
from secateur.keras.host import KerasHost
from secateur.layout import Layout
from secateur.metrics.evaluation import Evaluation, compare, of_classes
from secateur.metrics.outcome import Outcome
from secateur.plan import Plan, resized_masks
from secateur.pruning import Criterion, prune
from secateur.record import write_record
from secateur.records.outcome import record_of
from secateur.records.provenance import provenance_of
from secateur.schedule import cubic
from secateur.select import Pattern, Unit

LOSS = keras.losses.SparseCategoricalCrossentropy
TASK = "classification"
"""What reports call the task: a model here gives one class a row, whatever its inputs are."""


@dataclass(frozen=True)
class Arrays:
    """Inputs (one array, or one for each input of the model by name) and class numbers, in equal order."""

    x: Any
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Any) -> "Arrays":
        """The rows at those positions."""
        x = {k: v[rows] for k, v in self.x.items()} if isinstance(self.x, dict) else self.x[rows]
        return Arrays(x, self.y[rows])

    def batches(self, size: int) -> list[tuple[Any, np.ndarray]]:
        """(x, y) in batches."""
        parts = [self.take(slice(start, start + size)) for start in range(0, len(self), size)]
        return [(part.x, part.y) for part in parts]


@dataclass(frozen=True)
class KerasStage:
    """What to prune."""

    criterion: Criterion
    pattern: Pattern
    budget: Budget | None


@dataclass(frozen=True)
class KerasTuning:
    """Fine-tuning after pruning. gradual: prune along a cubic schedule while training."""

    epochs: float = 0.0
    learning_rate: float = 1e-4
    seed: int = 0
    gradual: bool = False
    batch_size: int = 32


def read_arrays(source: str | Path | None, model: keras.Model) -> Arrays:
    """Read an `.npz` with `y` and either `x` or one array named after each input of the model.

    Raises DataError: no file, no such arrays, unequal lengths, labels that are no class numbers.
    """
    if source is None:
        raise DataError("data is needed here; pass --data FILE.npz with arrays x and y")
    path = Path(source)
    arrays = _read_npz(path)
    names = [tensor.name for tensor in model.inputs or []]
    if "y" not in arrays or ("x" not in arrays and not set(names) <= set(arrays)):
        raise DataError(f"{path} needs arrays y and x (or {', '.join(names)}); it has {', '.join(arrays) or 'none'}")
    x, y = arrays["x"] if "x" in arrays else {name: arrays[name] for name in names}, arrays["y"]
    lengths = {len(y), *(len(a) for a in (x.values() if isinstance(x, dict) else [x]))}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(
            f"{path}: arrays of {', '.join(map(str, sorted(lengths)))} rows; they must be equal and not empty"
        )
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
        raise DataError(f"{path}: y of shape {y.shape} and type {y.dtype}; it must be one class number a row")
    return Arrays(x, y)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name."""
    if not path.exists():
        raise DataError(f"no data at {path}")
    if path.suffix != ".npz":
        raise DataError(f"{path.name} is no .npz; Keras models take arrays: numpy.savez(file, x=..., y=...)")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as .npz: {str(error).splitlines()[0]}") from None


def split(data: Arrays, share: float, seed: int) -> tuple[Arrays, Arrays]:
    """Two disjoint parts, the second with about `share` of the rows of every label, both shuffled with the seed."""
    rng = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(data.y):
        rows = rng.permutation(np.flatnonzero(data.y == label))
        held_out += rows[: round(len(rows) * share)].tolist()
    rest = np.setdiff1d(np.arange(len(data)), held_out)
    if not held_out or not len(rest):
        raise DataError(f"{len(data)} rows are too few to hold out {share:.0%} of them")
    return data.take(rng.permutation(rest)), data.take(rng.permutation(held_out))


def logits(model: keras.Model, data: Arrays, batch_size: int) -> np.ndarray:
    """Class scores (examples, classes) as logarithms; ModelError when the model is no classifier for these labels."""
    parts = [floats(run_model(model, x)) for x, _ in data.batches(batch_size)]
    if not parts[0] or parts[0][0].ndim != 2 or parts[0][0].shape[1] <= data.y.max():
        raise ModelError(f"{model.name} does not give one row of scores with a class {data.y.max()} for each example")
    scores = np.concatenate([part[0] for part in parts])
    if not np.isfinite(scores).all():
        raise ModelError("the model answers NaN or infinity on this data; look for NaN or huge values in its weights")
    return np.log(np.clip(scores, 1e-30, None)) if _are_probabilities(scores) else scores


def evaluate(scores: np.ndarray, data: Arrays, dense: np.ndarray | None = None) -> Evaluation:
    """The evaluation of `logits` on the rows; dense: those of the dense model on the same rows."""
    return of_classes(TASK, scores, data.y, dense)


def _are_probabilities(scores: np.ndarray) -> bool:
    """Whether every row sums to one, as after a softmax, whichever layer or operation computes it."""
    return bool((scores >= 0).all() and np.allclose(scores.sum(-1), 1.0, atol=1e-3))


def _loss_for(model: keras.Model, data: Arrays) -> keras.losses.Loss:
    """Cross-entropy for a model whose outputs on a few rows are logits or probabilities."""
    scores = floats(run_model(model, data.take(slice(8)).x))[0]
    return LOSS(from_logits=not _are_probabilities(scores))


def run(
    host: KerasHost,
    stage: KerasStage,
    train: Arrays,
    test: Arrays,
    tuning: KerasTuning,
    output: Path,
    *,
    calibration_samples: int = 512,
    overwrite: bool = False,
    say: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, description: items,
) -> Outcome:
    """Do the whole job on a copy; `host` itself stays dense.

    Raises VerifyError when masked and shrunk differ, ModelError when the reloaded model gives other outputs or NaN,
    DataError for a number of epochs above 1 that is not whole.
    """
    if not (0 <= tuning.epochs <= 1 or float(tuning.epochs).is_integer()):
        raise DataError(
            f"{tuning.epochs} epochs cannot be trained on a Keras model; pass whole epochs, or less than one"
        )
    began, size = time.perf_counter(), tuning.batch_size
    dense = logits(host.model, test, size)
    host.loss = host.loss or _loss_for(host.model, test)
    calibration = train.take(slice(calibration_samples)).batches(size)
    plan = prune(host, stage.criterion, stage.pattern, stage.budget, say(calibration, "scoring"))
    plan = plan if host.plan is None else host.plan.merge(plan).check(host.layout)
    verdict = verify(host, plan, test.batches(size))
    with host.masked(plan):
        pruned = evaluate(logits(host.model, test, size), test, dense)
    small = host.copy()
    if not (tuning.gradual and tuning.epochs):
        small.resize(plan)
    tuned = None
    if tuning.epochs:
        plan = _tune(small, host.layout, stage, plan, train, tuning)
        tuned = evaluate(logits(small.model, test, size), test, dense)
    expected = small.outputs(test.batches(size)[0])
    count = parameters(host.layout, plan)
    before = evaluate(dense, test, dense)
    dense_macs = macs(host.layout)
    outcome = Outcome(
        name=output.name,
        dense=before,
        pruned=pruned,
        tuned=tuned,
        drop=compare(before, tuned or pruned),
        total=count.total,
        nonzero=count.nonzero,
        macs_ratio=macs(host.layout, plan) / dense_macs if dense_macs else None,
        difference=verdict.difference,
        folder=str(output),
        inexact=verdict.inexact,
        provenance=dict(plan.provenance),
    )
    with new_folder(output, overwrite=overwrite) as folder:
        files.write(small.model, folder, plan)
        again = KerasHost(files.load(folder), test.batches(size)[0])
        reloaded = check_reloaded(expected, again.outputs(test.batches(size)[0]))
        weight = sum(file.stat().st_size for file in folder.iterdir())
        provenance = provenance_of(
            seconds=time.perf_counter() - began, seed=tuning.seed, packages=["keras", "tensorflow", "jax"]
        )
        write_record(record_of(outcome, host.layout, plan, provenance=provenance), folder)
    return replace(outcome, bytes=weight, reload_difference=reloaded)


def _tune(small: KerasHost, layout: Layout, stage: KerasStage, plan: Plan, train: Arrays, tuning: KerasTuning) -> Plan:
    """Fine-tune with the zeros held, or prune gradually meanwhile; returns the plan of the zeros at the end."""
    keras.utils.set_random_seed(tuning.seed)
    loss = _loss_for(small.model, train)
    small.model.compile(keras.optimizers.AdamW(tuning.learning_rate, weight_decay=0.01), loss)
    part = train if tuning.epochs >= 1 else train.take(slice(max(1, round(len(train) * tuning.epochs))))
    epochs = max(1, int(tuning.epochs))
    steps = epochs * -(-len(part) // tuning.batch_size)
    options = {"epochs": epochs, "batch_size": tuning.batch_size, "verbose": 0}
    if not tuning.gradual:
        with small.hold(resized_masks(layout, plan)):
            small.model.fit(part.x, part.y, **options)
        return plan
    budget = stage.budget
    if not isinstance(budget, Uniform | Global) or isinstance(stage.pattern, Unit):
        raise PlanError("gradual pruning needs single weights or blocks, and a sparsity; leave out --gradual")
    every = max(1, steps // 20)
    schedule = cubic(budget.sparsity, steps=max(1, round(0.7 * steps)))
    callback = GradualPruning(
        schedule, every=every, criterion=stage.criterion, pattern=stage.pattern, budget=type(budget)
    )
    small.model.fit(part.x, part.y, callbacks=[callback], **options)
    last = callback.plan.check(small.layout)
    return replace(last, provenance={**last.provenance, "gradual": True})
