"""Attention between sparse layers on the kernels, through the attention interface of transformers.

With linear layers ten times cheaper, attention takes most of an encoder's time, and torch's kernel for it does not gain
from a second thread at one short text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.kernels.native import load_native
from secateur.runtime.layers.operators import attention, run
from secateur.torch.stats.attention_scores import KNOWN

NAME = "secateur"


def use_attention(model: nn.Module) -> bool:
    """Let a transformers model that attends by torch's SDPA use the kernels where they can; whether it does."""
    config: Any = getattr(model, "config", None)
    if load_native() is None or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if not hasattr(model, "set_attn_implementation"):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(config._attn_implementation == NAME)


def attend(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    query is (batch, heads, queries, width), key and value are (batch, kv heads, keys, width); returns (batch, queries,
    heads, width) and no attention weights. Calls that the kernels cannot compute go to torch's SDPA.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _fits(module, query, key, value, attention_mask, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    factor = query.shape[3] ** -0.5 if scale is None else scale
    return run(attention, query, key, value, attention_mask, factor), None


def _fits(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the kernels can compute the call; arguments in `KNOWN` change nothing beyond what is checked here."""
    if any(value is not None and name not in KNOWN for name, value in kwargs.items()):
        return False
    if kwargs.get("dropout") or kwargs.get("output_attentions"):
        return False
    if q.requires_grad or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (q, k, v)):
        return False
    if v.shape != k.shape or q.shape[3] != k.shape[3]:
        return False
    if mask is None:
        is_causal = kwargs.get("is_causal")
        # A query alone, the last of its text, sees all keys.
        return q.shape[2] == 1 or not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return mask.dim() == 4 and mask.dtype in (torch.float32, torch.bool) and mask.shape[3] == k.shape[2]
