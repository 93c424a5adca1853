"""How much the pooled token attends to each other one, through the attention interface of transformers.

The output is torch's SDPA; the score costs one more row of the softmax. While tokens are merged, each counts as often
in the softmax as it stands for tokens (proportional attention, Bolya et al., 2023).
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from secateur.errors import ModelError
from secateur.torch.stats.attention_scores import EXPLAINED, weights_of
from secateur.torch.tokens.call import running

NAME = "secateur_tokens"


def attend(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The output of an attention module, as the attention interface of transformers asks for it."""
    call = running()
    if call is None or call.ignored or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    call.scored.append(call.block)
    if call.schedule.method == "merge":
        call.keys = key.mean(1)
        if call.sizes is not None:
            weight = call.sizes.log()[:, None, None, :]
            attention_mask = weight if attention_mask is None else _additive(attention_mask, query.dtype) + weight
    elif call.schedule.reduces(call.block):
        call.score = _score(module, query, key, value, attention_mask, kwargs)
        if call.schedule.method == "random":
            call.score = torch.rand_like(call.score).masked_fill(call.score < 0, -1.0)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # torch.export drops `.contiguous()` where the strides make it do nothing, and other runtimes have other strides
    return output.clone(memory_format=torch.contiguous_format), None


def _score(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, kwargs: Any) -> torch.Tensor:
    """Mean over heads of the softmax row of the pooled token, (batch, keys); padding gets -1."""
    unknown = [n for n, v in kwargs.items() if v is not None and not isinstance(v, bool) and n not in EXPLAINED]
    if unknown:
        raise ModelError(f"an attention takes {unknown[0]!r}, which is not understood here; leave its tokens alone")
    bias = kwargs.get("position_bias")
    first = {**kwargs, "is_causal": False}
    if bias is not None and bias.shape[-2] > 1:
        first["position_bias"] = bias[..., :1, :]
    row = None if mask is None else mask[..., :1, :] if mask.shape[-2] != 1 else mask
    weights, _ = weights_of(module, query[:, :, :1], key, value, row, first)
    score = weights.mean(1)[:, 0]
    if row is None:
        return score
    seen = row if row.dtype == torch.bool else row > -1e4
    return score.masked_fill(~seen[:, 0, 0].expand(score.shape), -1.0)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to be added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
