"""Which task a model has: from the Auto class that transformers files its architecture under, and its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.errors import DataError, ModelError, listed, meant
from secateur.tasks.audio_classification import AudioClassification
from secateur.tasks.automatic_speech_recognition import SpeechRecognition
from secateur.tasks.base.task import Options, Task
from secateur.tasks.feature_extraction import FeatureExtraction
from secateur.tasks.fill_mask import FillMask
from secateur.tasks.image_classification import ImageClassification
from secateur.tasks.question_answering import QuestionAnswering
from secateur.tasks.text2text_generation import Text2TextGeneration
from secateur.tasks.text_classification import TextClassification
from secateur.tasks.text_generation import TextGeneration
from secateur.tasks.token_classification import TokenClassification
from secateur.torch.open import read_config

TASKS: tuple[type[Task], ...] = (
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    ImageClassification,
    AudioClassification,
    SpeechRecognition,
    Text2TextGeneration,
    TextGeneration,
    FillMask,
    FeatureExtraction,
)
"""Every task; where an architecture belongs to several, the first."""


def named(name: str) -> type[Task]:
    """The task of that name, or of the Auto class `AutoModelFor<name>`; DataError when there is none."""
    for task in TASKS:
        if name == task.name or name in task.auto_classes:
            return task
    names = [task.name for task in TASKS]
    raise DataError(f"no task {name!r}; there is {listed(names)}{meant(name, names)}")


def auto_class(source: str, name: str | None, **options: Any) -> str | None:
    """The Auto class (without `AutoModelFor`) that loads a folder for a task; None for the class that its config names.


    name: of a task, or of an Auto class. options: of `from_pretrained`.
    """
    if name is None:
        return None
    if not any(name == task.name for task in TASKS):
        return name
    wanted, config = named(name), read_config(source, **options)
    return None if task_of_config(config) is wanted else auto_class_for(wanted, config)


def auto_class_for(task: type[Task], config: Any) -> str:
    """The Auto class of a task that has a model for this type of config; its first where none has."""
    return next((auto for auto in task.auto_classes if _models(auto, config)), task.auto_classes[0])


def headless(config: Any) -> type[Task]:
    """The task to which an encoder without a head is trained: the classification of what it reads."""
    kinds = (TextClassification, ImageClassification, AudioClassification)
    return next((task for task in kinds if _models(task.auto_classes[0], config)), TextClassification)


def task_of_config(config: Any) -> type[Task] | None:
    """The task of the architecture that a config names, or None where none of the tasks takes it."""
    return _task_of(config, getattr(config, "architectures", None) or ())


def _task_of(config: Any, names: Sequence[str]) -> type[Task] | None:
    """The task of one of the architectures, with this config."""
    return next((task for task in TASKS if any(_files(auto, config, names) for auto in task.auto_classes)), None)


def _files(auto: str, config: Any, names: Any) -> bool:
    """Whether transformers' Auto class has one of the names for this type of config."""
    return any(model.__name__ in names for model in _models(auto, config))


def _models(auto: str, config: Any) -> list[Any]:
    """The models of transformers' Auto class for this type of config."""
    import transformers  # optional

    factory = getattr(transformers, f"AutoModelFor{auto}", None) or getattr(transformers, auto, None)
    model = None if factory is None else factory._model_mapping.get(type(config), None)
    models = model if isinstance(model, tuple) else (model,)
    return [m for m in models if m is not None]


def kind_of(model: nn.Module, name: str | None = None) -> type[Task]:
    """The task of a model; `name` wins over what the model says.

    Raises ModelError when the model has none of the tasks, DataError for an unknown name.
    """
    found = None if name is None else named(name)
    if found is None and hasattr(model, "config"):  # which may name the architecture of a checkpoint with another head
        found = _task_of(model.config, (type(model).__name__,)) or task_of_config(model.config)
    if found is None:
        raise ModelError(
            f"no task is known for a {type(model).__name__}; name one with --task, of "
            f"{listed(t.name for t in TASKS)}, or give a loss and a metric (secateur.tasks.given)"
        )
    return found


def find(model: nn.Module, processor: Any = None, *, task: str | None = None, options: Options | None = None) -> Task:
    """The task of a model, see `kind_of`.

    processor: its tokenizer, image processor or feature extractor; None where rows are not encoded.
    task: a name that wins over what the model says.
    """
    return kind_of(model, task)(model, processor, options)
