"""The Keras side of `secateur prune`: a `.keras` file and arrays in, the same job and report out."""

from pathlib import Path
from typing import Any

from secateur.cli import common


def refuse(options: dict[str, Any]) -> None:
    """PlanError for options that only text classifiers of transformers have."""
    from secateur.errors import PlanError

    for name, value in options.items():
        if value:
            raise PlanError(f"{name} is not there for Keras models; leave it out")


def prune(
    model: str,
    output: Path,
    choice: tuple[Any, Any, Any],
    data: tuple[Path | None, Path | None],
    calibration_samples: int,
    tuning: dict[str, Any],
    threads: int | None,
    overwrite: bool,
) -> Any:
    """The job on a `.keras` file; data are `.npz` files with x and y."""
    from secateur.opening import keras_module

    keras = keras_module("secateur.keras")
    workflow = keras_module("secateur.keras.workflow")
    if threads is not None:
        keras_module("secateur.keras.threads").set_threads(threads)
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
        *choice,
        train,
        test,
        workflow.Tuning(**tuning),
        output,
        calibration_samples=calibration_samples,
        overwrite=overwrite,
        say=common.track,
    )
