"""How much the pooled token attends to each other one, through the attention interface of transformers.

The output is torch's SDPA; the score costs one more row of the softmax. While tokens are merged, each counts as often
in the softmax as it stands for tokens (proportional attention, Bolya et al., 2023).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from secateur.errors import ModelError
from secateur.torch.stats.attention_scores import EXPLAINED, weights_of
from secateur.torch.tokens.call import NO_MASK, TokenCall, running

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
        if attention_mask is not None and not torch.compiler.is_exporting():
            raise ModelError(NO_MASK)
        if call.sizes is not None:
            attention_mask = call.sizes.log()[:, None, None, :]
    elif any(call.schedule.reduces(block) for block in range(call.block, len(call.schedule.keep))):
        score = _score(call, module, query, key, value, attention_mask, kwargs)
        is_random = call.schedule.method == "random"
        call.score = torch.rand_like(score).masked_fill(score < 0, -1.0) if is_random else score
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # torch.export drops `.contiguous()` where the strides make it do nothing, and other runtimes have other strides
    return output.clone(memory_format=torch.contiguous_format), None


def _score(
    call: TokenCall, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """The mean over heads of the softmax row of the pooled token, (batch, keys); padding gets -1.

    Where a window hides tokens from the pooled one, the scores of the last block without one count.
    """
    unknown = [n for n, v in kwargs.items() if v is not None and not isinstance(v, bool) and n not in EXPLAINED]
    if unknown:
        raise ModelError(f"an attention takes {unknown[0]!r}, which is not understood here; leave its tokens alone")
    bias = kwargs.get("position_bias")
    first = {**kwargs, "is_causal": False}
    if bias is not None and bias.shape[-2] > 1:
        first["position_bias"] = bias[..., :1, :]
    row = None if mask is None else mask[..., :1, :]
    weights, _ = weights_of(module, query[:, :, :1], key, value, row, first)
    score = weights.mean(1)[:, 0]
    if row is None:
        call.earlier = score
        return score
    allowed = mask if mask.dtype == torch.bool else mask > LEAST
    seen = allowed[:, 0, 0].expand(score.shape)
    real = allowed[:, 0].to(score.dtype).amax(1).expand(score.shape) > 0
    hides = (real & ~seen).any(1, keepdim=True)
    # without an earlier block, what the window hides follows what it shows, the first tokens before the later ones
    steps = torch.arange(score.shape[1], device=score.device) * 1e-9
    earlier = torch.where(seen, score, -steps) if call.earlier is None else call.earlier
    call.earlier = torch.where(hides, earlier, score)
    return call.earlier.masked_fill(~real, -1.0)


LEAST = -1e4
"""A mask that is added to scores hides what has a lower number."""

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
