"""Saving and loading: a folder with `model.keras` and the plan. No pickle; `safe_mode` stays on."""

from pathlib import Path
from typing import Any

import keras

from secateur.errors import ModelError
from secateur.files import new_folder
from secateur.keras.trace import line
from secateur.plan import Plan

NAME = "model.keras"


def save(model: keras.Model, folder: Path | str, plan: Plan | None = None, *, overwrite: bool = False) -> None:
    """Write `model.keras`, and `plan.json` beside it, whole or not at all."""
    with new_folder(Path(folder), overwrite=overwrite) as work:
        write(model, work, plan)


def write(model: keras.Model, folder: Path, plan: Plan | None) -> None:
    """Write the files of `save` into an existing folder."""
    try:
        model.save(folder / NAME)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{model.name} cannot be written as .keras: {line(error)}") from error
    if plan is not None:
        plan.save(folder)


def load(path: Path | str, custom_objects: dict[str, Any] | None = None) -> keras.Model:
    """Load a `.keras` file, or a folder that `save` wrote.

    custom_objects: the classes of layers that are neither Keras' own nor registered.
    Raises ModelError with one sentence when the file is missing, damaged or unsafe.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no Keras model at {path}; pass a .keras file or a folder that holds {NAME}")
    try:
        return keras.saving.load_model(file, custom_objects=custom_objects, safe_mode=True)
    except Exception as error:  # a damaged archive breaks Keras in many ways
        raise ModelError(f"{file} cannot be loaded: {line(error)}") from error
