"""Distillation: a pruned model learns from the logits and hidden states of the dense model from which it was pruned.

Sources: Hinton et al., 2015; Sanh et al., 2020; Kurtic et al., 2022.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from secateur.torch.base.batches import LABELS, call, run

TEMPERATURE = 2.0


Divergence = Callable[[Any, Any, Mapping[str, Any], float], torch.Tensor]
"""(output, dense output, batch, temperature) -> for each example how far they are apart, times temperature squared."""
Loss = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


def of_logits(output: Any, dense: Any, batch: Mapping[str, Any], temperature: float) -> torch.Tensor:
    """T^2 KL(dense || model) of the logits (examples, ..., classes), summed over positions."""
    own, wanted = output.logits / temperature, dense.logits / temperature
    kl = F.kl_div(own.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return temperature**2 * kl.flatten(1).sum(1)


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    batch: Mapping[str, Any],
    divergence: Divergence = of_logits,
    loss: Loss | None = None,
    *,
    with_labels: bool = True,
) -> tuple[torch.Tensor, Any]:
    """Task loss + divergence at temperature T + sum over layers of MSE(h_s, h_t) / MSE(h_t, 0).

    The task loss counts where the batch has labels. Hidden states count in Hugging Face models, where both models have
    equally many, of equal shape (unless layers or hidden width were removed), without padding.

    divergence: of the task. loss: of the task; None for the model's own. with_labels: whether labels count.

    Returns the loss and the student's output.
    """
    is_labelled = with_labels and not set(LABELS).isdisjoint(batch)
    states = {"output_hidden_states": True} if hasattr(getattr(model, "config", None), "to_dict") else {}
    asked = {**batch, **states}
    output = call(model, asked) if is_labelled and loss is None else run(model, asked)
    with torch.no_grad():
        target = run(teacher, asked)
    total = divergence(output, target, batch, TEMPERATURE).mean()
    if is_labelled and loss is not None:
        total = total + loss(model, batch)
    elif is_labelled:
        total = total + output.loss
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        mask = None if name == "decoder_hidden_states" else batch.get("attention_mask")
        own_states, dense_states = (getattr(o, name, None) or () for o in (output, target))
        if len(own_states) == len(dense_states):
            for own, wanted in list(zip(own_states, dense_states, strict=True))[1:]:
                if own.shape == wanted.shape:
                    total = total + _relative_error(own, wanted, mask)
    return total, output


def _relative_error(own: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is not None and mask.shape == own.shape[:2]:
        own, wanted = own[mask.bool()], wanted[mask.bool()]
    return (own - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
