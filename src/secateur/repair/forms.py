"""Finds the form of an inner loop that is fast for the arrays at hand."""

import importlib
from collections.abc import Callable
from typing import Any

import array_api_compat

from secateur.arrays import Array


def fast_form(name: str, array: Array) -> Callable[..., Any] | None:
    """The torch form of an inner loop (see `secateur.torch.repair_loops`) when the array is a tensor, else None."""
    if not array_api_compat.is_torch_array(array):
        return None
    found: Callable[..., Any] = getattr(importlib.import_module("secateur.torch.repair_loops"), name)
    return found
