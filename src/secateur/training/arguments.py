"""The file of --train-args: fields of transformers' TrainingArguments, checked before a model is loaded."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from secateur.errors import PlanError, shown
from secateur.schemas.reading import read_json
from secateur.schemas.yaml_reading import line_of, read_yaml

REFUSED = {
    "fsdp": "zeros are held on whole weights, which it splits",
    "fsdp_config": "zeros are held on whole weights, which it splits",
    "deepspeed": "zeros are held on whole weights, which it may split",
    "parallelism_config": "zeros are held on whole weights, which it may split",
    "remove_unused_columns": "the rows are encoded already",
    "eval_strategy": "the model is evaluated after the training",
    "eval_steps": "the model is evaluated after the training",
    "eval_on_start": "the model is evaluated after the training",
    "load_best_model_at_end": "the model is evaluated after the training",
    "do_eval": "the model is evaluated after the training",
    "do_predict": "nothing is predicted here",
    "local_rank": "torchrun says it",
}
"""Fields that have no place here, and why."""
INSTEAD = {
    "epochs": ("num_train_epochs", "max_steps"),
    "fine_tune": ("num_train_epochs", "max_steps"),
    "learning_rate": ("learning_rate",),
    "batch_size": ("per_device_train_batch_size",),
    "seed": ("seed",),
}
"""Option of a command -> the fields that it sets, which it wins over where it is given."""


def read(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, or of a JSON file by its ending.

    Raises PlanError, with the line of YAML, for a file that cannot be read, an unknown field, a value of a wrong type,
    and for what has no place here.
    """
    if path.suffix.lower() == ".json":
        values, node = read_json(path, error=PlanError, remedy="pass a JSON object of training arguments"), None
    else:
        values, node = read_yaml(path, "file of training arguments")
    hints: dict[str, Any] = {**typing.get_type_hints(TrainingArguments), "resume_from_checkpoint": str | bool | None}
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name, value in list(values.items()):
        where = str(path) if node is None else f"{path}, line {line_of(node, (name,))}"
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; do you mean {near[0]}?" if near else "; see TrainingArguments of transformers"
            raise PlanError(f"{where}: there is no training argument {shown(name)}{hint}")
        if name in REFUSED:
            raise PlanError(f"{where}: {name} has no place here, as {REFUSED[name]}; leave it out")
        if value is False and name.endswith("_strategy"):
            values[name] = "no"  # which YAML takes for a truth value
        _check(where, name, values[name], hints[name])
    if values.get("save_strategy", "no") != "no" and "output_dir" not in values:
        raise PlanError(f"{path}: save_strategy needs a place for the checkpoints; add output_dir")
    if values.get("resume_from_checkpoint") is True and "output_dir" not in values:
        raise PlanError(f"{path}: resume_from_checkpoint: true needs output_dir, where the checkpoints are")
    return values


def _check(where: str, name: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].lower()
        raise PlanError(f"{where}: {name} cannot be {shown(value)} ({reason})") from None


def without_given(values: Mapping[str, Any], given: Iterable[str], say: Callable[[str], None]) -> dict[str, Any]:
    """The fields that no option of the command line wins over; a sentence for each other one.

    given: the options that are on the command line, by the names of the command's parameters.
    """
    lost = {field: option for option in given for field in INSTEAD.get(option, ()) if field in values}
    for field, option in lost.items():
        say(f"--{option.replace('_', '-')} wins over {field} of --train-args")
    return {name: value for name, value in values.items() if name not in lost}
