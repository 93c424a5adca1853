"""open: finds the Host for a model. The only file that knows which frameworks there are, and imports them by name."""

import importlib
import sys
from pathlib import Path
from typing import Any

from secateur.errors import ModelError
from secateur.host import Host
from secateur.layout import Layout


def open(model: Any, example: Any = None, **options: Any) -> Host:
    """Make a Host of a model.

    model: a `torch.nn.Module`, a Hugging Face model, a folder or hub id that `from_pretrained` loads; a built Keras 3
        model or a `.keras` file.
    example: one batch that the model can run: a mapping of keyword arguments, a tuple of positional ones (labels may
        follow), or a tensor; made from the config of a Hugging Face model when left out.
    options: `layout=` (a Layout by hand, for models that cannot be traced), `loss=` (`loss(model, batch)`, for models
        that compute none); for folders also `task=`, `new_head=` (`new_head=print` makes and names an untrained head),
        `dtype=`, `revision=`, `trust_remote_code=`.
        For Keras models see `secateur.keras.KerasHost`.

    The exact zeros of the linear weights of a model that was pruned before, and the masks of `torch.nn.utils.prune`,
    become `host.plan`, which fine-tuning holds at zero.
    Raises ModelError with one sentence when the model cannot be opened.
    """
    layout = options.pop("layout", None)
    if isinstance(layout, str):
        layout = Layout.from_text(layout)
    if isinstance(model, str | Path) and is_keras_file(model):
        return _keras().KerasHost(_keras().load(model), example, layout=layout, **options)
    if isinstance(model, str | Path):
        return _torch("secateur.torch.open").open_folder(model, example, layout=layout, **options)
    keras = sys.modules.get("keras")  # before torch: on the torch backend its models are torch modules too
    if keras is not None and isinstance(model, getattr(keras, "Model", ())):
        return _keras().KerasHost(model, example, layout=layout, **options)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return _torch("secateur.torch.open").open_module(model, example, layout=layout, **options)
    raise ModelError(
        f"cannot open a {type(model).__name__}; pass a torch.nn.Module, a Keras 3 model, a folder or a hub id"
    )


def is_keras_file(path: str | Path) -> bool:
    """Whether a path is a `.keras` file, or a folder with a `model.keras` in it."""
    return str(path).endswith(".keras") or (Path(path) / "model.keras").is_file()


def keras_module(module: str) -> Any:
    """A module of the Keras host; ModelError when Keras or its backend is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in ("keras", "tensorflow", "torch", "jax"):
            raise ModelError(f"{error.name} is not installed; `pip install 'secateur[tensorflow]'`") from None
        raise


def _keras() -> Any:
    """The Keras host."""
    return keras_module("secateur.keras")


def _torch(module: str) -> Any:
    """A module of the torch host; ModelError when torch or transformers is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "transformers"):
            raise ModelError(f"{error.name} is not installed; `pip install 'secateur[torch]'`") from None
        raise
