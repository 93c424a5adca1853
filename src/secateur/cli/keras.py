"""The commands on `.keras` files and `.npz` arrays; their results fill the same tables. PyTorch is not imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli import common
from secateur.find_host import is_keras_file, keras_module

if TYPE_CHECKING:
    from secateur.cli.pruning.choice import Choice


def open_host(model: str, example: Any = None, layout: Any = None) -> Any:
    """The Host of a `.keras` file."""
    keras = keras_module("secateur.keras")
    return keras.KerasHost(keras.load(model), example, layout=layout)


def inspect(model: str, layout_file: Path | None) -> tuple[Any, dict[str, list[int]]]:
    """The Host, and the shape of one example, in which open lengths count as 1."""
    host = open_host(model, layout=common.read_layout(layout_file))
    return host, {t.name: [n or 1 for n in t.shape] for t in host.model.inputs}


def evaluate(model: str, data: str | None, against: str | None, batch_size: int, threads: int | None) -> Any:
    """The Evaluation of a classifier on an `.npz` file, and its Drop from a dense one if there is one, else None."""
    from secateur.metrics.evaluation import compare

    workflow = _workflow(threads)
    keras = keras_module("secateur.keras")
    network = keras.load(model)
    rows = workflow.read_arrays(data, network)
    if against is None:
        return workflow.evaluate(workflow.logits(network, rows, batch_size), rows), None
    dense = workflow.logits(keras.load(against), rows, batch_size)
    result = workflow.evaluate(workflow.logits(network, rows, batch_size), rows, dense)
    return result, compare(workflow.evaluate(dense, rows, dense), result)


def refuse_training(model: str) -> None:
    """PlanError that says how Keras models are trained."""
    from secateur.errors import PlanError

    raise PlanError(
        f"{model} is trained by `model.fit` in Python, with zeros held after `secateur.keras.prune(model, ...)` or by "
        "callbacks=[secateur.keras.GradualPruning(schedule=...)]; `secateur prune --fine-tune` trains after pruning"
    )


def export(model: str, to: str, output: Path, data: str | None, samples: int, **options: Any) -> Any:
    """The Artefact of a `.keras` file for a runtime."""
    network = keras_module("secateur.keras").load(model)
    rows = None
    if data is not None:
        rows = keras_module("secateur.keras.workflow").read_arrays(data, network).take(slice(samples)).x
    return keras_module("secateur.deploy.jobs.keras_jobs").export(network, to, output, data=rows, **options)


def bench(models: Sequence[str], runtimes: list[str] | None, **options: Any) -> Any:
    """The Bench of `.keras` files."""
    from secateur.errors import PlanError

    other = next((m for m in models if not is_keras_file(m)), None)
    if other is not None:
        raise PlanError(f"{other} is no .keras file; compare Keras models with each other")
    return keras_module("secateur.deploy.jobs.keras_jobs").bench(models, runtimes, **options)


def _workflow(threads: int | None) -> Any:
    if threads is not None:
        keras_module("secateur.keras.threads").set_threads(threads)
    return keras_module("secateur.keras.workflow")


def prune(
    model: str,
    output: Path,
    choice: "Choice",
    data: tuple[str | None, str | None],
    *,
    calibration_samples: int,
    tuning: dict[str, Any],
    threads: int | None,
    overwrite: bool,
) -> Any:
    """The Outcome of pruning a `.keras` file.

    data: `.npz` files with x and y, to train and calibrate on, and to report on.
    tuning: the fields of KerasTuning.
    """
    workflow = _workflow(threads)
    keras = keras_module("secateur.keras")
    host = keras.KerasHost(keras.load(model))
    train = workflow.read_arrays(data[0], host.model)
    seed = tuning["seed"]
    if data[1] is None:
        train, test = workflow.split(train, 0.1, seed)
    else:
        test = workflow.read_arrays(data[1], host.model)
    host.example = train.batches(tuning["batch_size"])[0]
    host = keras.KerasHost(host.model, host.example)
    return workflow.run(
        host,
        workflow.KerasStage(choice.criterion, choice.pattern, choice.budget),
        train,
        test,
        workflow.KerasTuning(**tuning),
        output,
        calibration_samples=calibration_samples,
        overwrite=overwrite,
        say=common.track,
    )
