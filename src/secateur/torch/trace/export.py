"""torch.export made safe for tracing: weights stay where they are, and the model comes back as it was."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.torch.base.batches import evaluating
from secateur.torch.base.expected_errors import in_a_line

Example = Mapping[str, Any] | tuple[Any, ...]


def export(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The ATen graph of the model's forward pass on the example, in evaluation mode.

    Raises ModelError with the cause when the model cannot be exported.
    """
    args = tuple(example) if not isinstance(example, Mapping) else ()
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args, kwargs = _on_device_of(model, args), _on_device_of(model, kwargs)
    with prepared(model, kwargs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:  # whatever the code of the model or the exporter raises
            raise ModelError(
                f"{type(model).__name__} cannot be exported by torch.export ({in_a_line(error, 220)}); "
                "write its layout by hand and read it with Layout.from_text"
            ) from error


def _on_device_of(model: nn.Module, values: Any) -> Any:
    """The example on the device of the parameters (a model on the meta device needs its inputs there)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(values, dict):
        return {name: move(value) for name, value in values.items()}
    return tuple(move(value) for value in values)


@contextlib.contextmanager
def prepared(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Evaluation mode, no gradients, no cache and the plainest kernels, all of it put back at the end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(_no_fast_path())
        for config in configs_of(model):
            stack.enter_context(attribute(config, "use_cache", value=False))
            stack.enter_context(attribute(config, "_experts_implementation_internal", value="batched_mm"))
        if "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in kwargs:
            kwargs["use_cache"] = False
        yield


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the time of the context; an attribute that the object does not have stays absent."""
    if name not in vars(owner):
        yield
        return
    before = vars(owner)[name]
    vars(owner)[name] = value
    try:
        yield
    finally:
        vars(owner)[name] = before


def configs_of(model: nn.Module) -> list[Any]:
    """The configuration objects of a Hugging Face model and those nested in them, once each."""
    configs: dict[int, Any] = {}
    queue = [getattr(m, "config", None) for m in model.modules()]
    while queue:
        config = queue.pop()
        if not hasattr(config, "to_dict") or id(config) in configs:
            continue
        configs[id(config)] = config
        queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(configs.values())
