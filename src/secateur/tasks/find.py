"""Which task a model has: from the Auto class that transformers files its architecture under, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.errors import DataError, ModelError, listed
from secateur.tasks.base.task import Options, Task
from secateur.tasks.question_answering import QuestionAnswering
from secateur.tasks.text_classification import TextClassification
from secateur.tasks.token_classification import TokenClassification
from secateur.torch.open import read_config

TASKS: tuple[type[Task], ...] = (TextClassification, TokenClassification, QuestionAnswering)
"""Every task; where an architecture belongs to several, the first."""


def named(name: str) -> type[Task]:
    """The task of that name, or of the Auto class `AutoModelFor<name>`; DataError when there is none."""
    for task in TASKS:
        if name == task.name or name in task.auto_classes:
            return task
    raise DataError(f"no task {name!r}; there is {listed(task.name for task in TASKS)}")


def auto_class(source: str, name: str | None, **options: Any) -> str | None:
    """The Auto class (without `AutoModelFor`) that loads a folder for a task; None for the class that its config names.


    name: of a task, or of an Auto class. options: of `from_pretrained`.
    """
    if name is None:
        return None
    if not any(name == task.name for task in TASKS):
        return name
    wanted = named(name)
    return None if task_of_config(read_config(source, **options)) is wanted else wanted.auto_classes[0]


def task_of_config(config: Any) -> type[Task] | None:
    """The task of the architecture that a config names, or None where none of the tasks takes it."""
    return _task_of(config, getattr(config, "architectures", None) or ())


def _task_of(config: Any, names: Sequence[str]) -> type[Task] | None:
    """The task of one of the architectures, with this config."""
    return next((task for task in TASKS if any(_files(auto, config, names) for auto in task.auto_classes)), None)


def _files(auto: str, config: Any, names: Any) -> bool:
    """Whether transformers' Auto class has one of the names for this type of config."""
    import transformers  # optional

    factory = getattr(transformers, f"AutoModelFor{auto}", None) or getattr(transformers, auto, None)
    model = None if factory is None else factory._model_mapping.get(type(config), None)
    models = model if isinstance(model, tuple) else (model,)
    return any(m is not None and m.__name__ in names for m in models)


def find(model: nn.Module, processor: Any = None, *, task: str | None = None, options: Options | None = None) -> Task:
    """The task of a model.

    processor: its tokenizer, image processor or feature extractor; None where rows are not encoded.
    task: a name that wins over what the model says.

    Raises ModelError when the model has none of the tasks, DataError for an unknown name.
    """
    found = None if task is None else named(task)
    if found is None and hasattr(model, "config"):  # which may name the architecture of a checkpoint with another head
        found = _task_of(model.config, (type(model).__name__,)) or task_of_config(model.config)
    if found is None:
        raise ModelError(
            f"no task is known for a {type(model).__name__}; name one with --task, of "
            f"{listed(t.name for t in TASKS)}, or give a loss and a metric (secateur.tasks.given)"
        )
    return found(model, processor, options)
