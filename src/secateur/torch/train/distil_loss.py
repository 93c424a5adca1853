"""Distillation: a pruned model learns from the logits and hidden states of the dense model from which it was pruned.

Sources: Hinton et al., 2015; Sanh et al., 2020; Kurtic et al., 2022.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import ModelError
from secateur.torch.base.batches import run

TEMPERATURE = 2.0


def distillation_loss(model: nn.Module, teacher: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    """Task loss + T^2 KL(teacher || student at temperature T) + sum over layers of MSE(h_s, h_t) / MSE(h_t, 0).

    Both are Hugging Face models. Hidden states count where both models have equally many, of equal shape (unless
    layers or hidden width were removed), without padding. Returns the loss and the student's output.
    """
    output = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        target = run(teacher, {**batch, "output_hidden_states": True})
    if output.loss is None:
        raise ModelError("distillation needs labels in each batch")
    student, dense = output.logits / TEMPERATURE, target.logits / TEMPERATURE
    answers = F.kl_div(student.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    loss = output.loss + TEMPERATURE**2 * answers
    pairs = list(zip(output.hidden_states or (), target.hidden_states or (), strict=False))
    if pairs and len(output.hidden_states) == len(target.hidden_states):
        mask = batch.get("attention_mask")
        for own, wanted in pairs[1:]:
            if own.shape == wanted.shape:
                loss = loss + _relative_error(own, wanted, mask)
    return loss, output


def _relative_error(own: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None and mask.shape == own.shape[:2]:
        own, wanted = own[mask.bool()], wanted[mask.bool()]
    return (own - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
