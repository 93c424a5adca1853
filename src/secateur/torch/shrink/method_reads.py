"""Which attributes the methods of a module class read, found in their code and source."""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Hashable, Iterator
from typing import Any

from torch import nn

_SETUP = ("__init__", "_init_weights", "reset_parameters", "extra_repr", "init_weights")


def reads(module_type: type, attribute: str) -> bool:
    """Whether a method of a module type, other than those that set it up, names the attribute."""
    return attribute in _names_in(module_type)


def powers(module_type: type) -> frozenset[str]:
    """Attributes that a method, other than those that set up, raises to a power or takes the root of.

    Such an attribute is a scale (`hidden * self.model_dim**-0.5` before tied logits), which must not follow the width.
    """
    return _powers_in(module_type)


@functools.cache
def _powers_in(module_type: Hashable) -> frozenset[str]:
    attributes: set[str] = set()
    for function in _methods(module_type):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # a function without source, such as one typed into a prompt
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
                base: ast.expr | None = node.left
            else:
                base = node.args[0] if isinstance(node, ast.Call) and node.args and _is_root(node.func) else None
            if isinstance(base, ast.Attribute):
                attributes.add(base.attr)
    return frozenset(attributes)


def _is_root(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("sqrt", "rsqrt")


def _methods(module_type: Any) -> Iterator[Any]:
    """Functions of a module type and its bases, without those that set a module up."""
    for cls in getattr(module_type, "__mro__", ()):
        if cls is nn.Module or cls is object:
            continue
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(function) if callable(function) else function
            if name not in _SETUP and getattr(function, "__code__", None) is not None:
                yield function


@functools.cache
def _names_in(module_type: Hashable) -> frozenset[str]:
    return frozenset(name for function in _methods(module_type) for name in _code_names(function.__code__))


def _code_names(code: types.CodeType) -> set[str]:
    names_used = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names_used |= _code_names(constant)
    return names_used
