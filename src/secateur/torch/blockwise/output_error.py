"""How far the output of a block or model is from the wanted one."""

from typing import Any

import torch

from secateur.errors import ModelError
from secateur.torch.shrink.masking import first_of


def first_tensor(output: Any, problem: str) -> torch.Tensor:
    """The first tensor of an output; ModelError with the sentence `problem` where there is none."""
    tensor = first_of(output)
    if tensor is None:
        raise ModelError(problem)
    return tensor


def relative_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - wanted|^2 / |wanted|^2.

    Each token is relative to its own size: the norm before the next layer removes the size, and otherwise the few
    tokens of huge size would decide the error alone.
    """
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
