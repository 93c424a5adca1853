"""Whether somebody watches, trains or has exchanged modules, so that their work may not be done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

CAPTURING = "transformers.utils.output_capturing"

Children = list[tuple[nn.Module, list[nn.Module | None]]]
"""Modules, each with its children."""


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks that do something in this call.

    Hooks that transformers leaves behind once a model has shown its hidden states do nothing until the next such call.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks) and not _at_rest(module)


def _at_rest(module: nn.Module) -> bool:
    """Whether all hooks of a module are transformers' own, and transformers collects nothing in this thread."""
    if module._forward_pre_hooks or torch.compiler.is_compiling():
        return False
    if any(getattr(hook, "__module__", "") != CAPTURING for hook in module._forward_hooks.values()):
        return False
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    return collector is not None and not collector.get()


def is_watched_inside(module: nn.Module) -> bool:
    """Whether a module inside has hooks; checked at each call, because hooks and children may be new.

    A loop takes a third of the time of a generator expression.
    """
    for child in module._modules.values():
        if child is None:
            continue
        if (child._forward_hooks or child._forward_pre_hooks) and is_watched(child):
            return True
        if child._modules and is_watched_inside(child):
            return True
    return False


def children(blocks: Sequence[nn.Module]) -> Children:
    """Each module in the blocks, and its children."""
    return [(module, [*module._modules.values()]) for block in blocks for module in block.modules()]


def untouched(inside: Children) -> bool:
    """Whether no module was exchanged, is in training mode, or is watched; checked at each call."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return False
    for module, before in inside:
        if module.training or "forward" in module.__dict__:
            return False
        if (module._forward_hooks or module._forward_pre_hooks) and is_watched(module):
            return False
        if [*module._modules.values()] != before:
            return False
    return True
