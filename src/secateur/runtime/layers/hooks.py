"""Whether somebody looks on while a module runs, so that its work may not be done elsewhere."""

from __future__ import annotations

import sys

import torch
from torch import nn

CAPTURING = "transformers.utils.output_capturing"


def is_watched(module: nn.Module) -> bool:
    """Whether hooks hang on a module that do something now.

    Those that transformers leaves behind once a model has shown its hidden states do nothing until the next time.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks) and not _at_rest(module)


def _at_rest(module: nn.Module) -> bool:
    """Whether all hooks of a module are transformers' own, and it collects nothing in this thread."""
    if module._forward_pre_hooks or torch.compiler.is_compiling():
        return False
    if any(getattr(hook, "__module__", "") != CAPTURING for hook in module._forward_hooks.values()):
        return False
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    return collector is not None and not collector.get()
