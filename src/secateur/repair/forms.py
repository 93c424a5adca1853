"""Finds the form of an inner loop that is fast for the arrays at hand."""

import importlib
from collections.abc import Callable
from typing import Any

import array_api_compat

from secateur.arrays import Array
from secateur.repair import loops


def inner_loop(name: str, array: Array, *, fast: bool = True) -> Callable[..., Any]:
    """The loop `name` of `secateur.repair.loops`, or its fast form in `secateur.torch.repair_loops` for a torch tensor.

    The torch form is imported by name, when it is first needed: the core imports no framework.
    """
    in_torch = fast and array_api_compat.is_torch_array(array)
    form: Callable[..., Any] = getattr(
        importlib.import_module("secateur.torch.repair_loops") if in_torch else loops, name
    )
    return form
