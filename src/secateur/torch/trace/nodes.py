"""What one node of an exported graph says of itself: operation, module, shapes and types of its results."""

import re
from typing import Any

import torch
from torch import fx

from secateur.torch.trace.values import UNKNOWN_EXTENT


def plain_name(node: fx.Node) -> str:
    """`add` for aten.add_.Tensor; empty for a node that is no operation."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules that ran a node, the outermost first; repeated calls of a module have one path."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [re.sub(r"@\d+", "", str(path)) for path, _ in stack]


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that ran a node."""
    return (modules_of(node) or [""])[-1]


def shapes_of(node: fx.Node) -> list[tuple[int, ...] | None]:
    """The shape of each result; None for a result that is no tensor."""
    return [_shape(result) for result in _results(node)] or [None]


def dtype_of(node: fx.Node, index: int) -> str:
    """`float`, `int` or `bool`; `int` for a result that is no tensor."""
    results = _results(node)
    result = results[index] if index < len(results) else None
    if not isinstance(result, torch.Tensor):
        return "int"
    if result.dtype == torch.bool:
        return "bool"
    return "float" if result.dtype.is_floating_point or result.dtype.is_complex else "int"


def _results(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(_extent(extent) for extent in value.shape) if isinstance(value, torch.Tensor) else None


def _extent(value: Any) -> int:
    try:
        return int(value)
    except (RuntimeError, TypeError):  # a size that depends on data
        node = getattr(value, "node", None)
        expression = node.expr if node is not None else value
        symbols = dict.fromkeys(getattr(expression, "free_symbols", ()), UNKNOWN_EXTENT)
        return int(expression.subs(symbols))
