"""Attention scores of a Hugging Face model, seen through its `AttentionInterface`: no model is edited.

The observer computes the softmax weights beside torch's SDPA and checks that they explain its output; where the model
caps its scores or has sinks, which SDPA does not know, they give the output. A model that asks for anything else is
refused rather than scored wrongly.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Axis, Layout
from secateur.stats import Tally
from secateur.torch.stats.padding import TokenMask

NAME = "secateur_observer"

KNOWN = {"scaling", "dropout", "is_causal", "position_ids", "output_attentions", "use_cache", "position_embeddings"}
"""Arguments of attention that ask for nothing beyond SDPA; `secateur.runtime.layers.attention` goes by them too."""

BY_WEIGHTS = ("softcap", "s_aux")
"""Arguments that SDPA does not take, and `_weights` does: a cap of the scores, and a sink for each head."""

EXPLAINED = {*KNOWN, *BY_WEIGHTS, "position_bias", "sliding_window", "cache_position", "num_items_in_batch"}
"""Arguments of which the softmax weights here take account, or that change no attention: a sliding window is in the
mask too. Flags (True, False) change none either.
"""


@contextlib.contextmanager
def observe_attention(
    model: nn.Module, layout: Layout, needs: set[str], tally: Tally, token_mask: TokenMask
) -> Iterator[None]:
    """While the context lasts, every forward pass adds the attention quantities in `needs` to `tally`.

    Raises ModelError when the model does not go through the attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "attention scores are read through the attention interface of transformers, which a "
            f"{type(model).__name__} does not have; use magnitude, gradient, taylor, fisher or activation"
        )
    names = {id(module): name for name, module in model.named_modules()}
    heads: dict[int, tuple[Axis, torch.Tensor | None]] = {}

    def attend(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        path = names.get(id(module))
        strange = [n for n, v in kwargs.items() if v is not None and not isinstance(v, bool) and n not in EXPLAINED]
        if strange:
            raise ModelError(
                f"the attention in {path or type(module).__name__} takes {strange[0]!r}, which is not understood here, "
                "so its heads cannot be scored by it; use magnitude, gradient, taylor, fisher or activation"
            )
        capped = any(kwargs.get(name) is not None for name in BY_WEIGHTS)
        if capped:
            weights, values = _weights(module, query, key, value, attention_mask, kwargs)
            output = (weights @ values).transpose(1, 2).to(query.dtype).contiguous()
        else:
            output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if path is not None:
            if id(module) not in heads:
                found = _head_axis(layout, path, query.shape[1])
                if found is None:
                    return output, None
                heads[id(module)] = (
                    found,
                    _output_grams(model, layout, found, path) if "attn_output" in needs else None,
                )
            axis, grams = heads[id(module)]
            with torch.no_grad():
                weights, values = _weights(module, query, key, value, attention_mask, kwargs)
                _explain(path, weights, values, output)
                mask = token_mask(path, (query.shape[0], query.shape[2]))
                _add(tally, axis.name, needs, weights, values, grams, mask)
        return output, None

    before = _implementations(model)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ModelError(
                f"{type(model).__name__} does not let its attention be observed; use magnitude, gradient, "
                "taylor, fisher or activation"
            )
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def _implementations(model: nn.Module) -> list[tuple[Any, Any]]:
    """The attention implementation of every config in the model, to be put back as it was."""
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            for one in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
                if one is not None and hasattr(one, "_attn_implementation_internal"):
                    configs[id(one)] = (one, one._attn_implementation_internal)
    return list(configs.values())


def _head_axis(layout: Layout, path: str, size: int) -> Axis | None:
    """The axis of query heads whose projections lie under the attention module."""
    for axis in layout.axes.values():
        candidate = axis.kind == "head" and axis.size == size
        if candidate and any(param.startswith(f"{path}.") for param in layout.members(axis.name)):
            return axis
    return None


def _output_grams(model: nn.Module, layout: Layout, axis: Axis, path: str) -> torch.Tensor:
    """W_O^T W_O of each head, shape (heads, d, d), so that |y W_O| = sqrt(y G y^T) for a head's output y."""
    readers = [
        name for name, linear in layout.linears.items() if layout.owners(name, axis.name)[linear.in_dim] is not None
    ]
    if not readers:
        raise ModelError(f"no output projection reads {axis.name}; use attention_mass instead of attention_output")
    name = max(readers, key=lambda reader: _shared_prefix(reader, path))
    weight = model.get_parameter(name).detach().float()
    weight = weight if layout.linears[name].in_dim == 1 else weight.T
    owner = torch.as_tensor(layout.owners(name, axis.name)[layout.linears[name].in_dim])
    grams = []
    for head in range(axis.size):
        columns = weight[:, (owner == head).to(weight.device)]
        grams.append(columns.T @ columns)
    return torch.stack(grams)


def _shared_prefix(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


def _weights(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights (batch, heads, queries, keys) and values repeated to the query heads, both float32.

    Scores are capped (softcap * tanh(score / softcap)) before the mask; a sink takes its share of each softmax.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1).float() for x in (key, value))
    scaling = kwargs.get("scaling")
    scores = query.float() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"].float()
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[-2]]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    else:
        causal = kwargs.get("is_causal")
        if (getattr(module, "is_causal", False) if causal is None else causal) and query.shape[2] > 1:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # a query that may see no key: its softmax is 0/0
    if kwargs.get("s_aux") is None:
        return scores.softmax(-1).masked_fill(blind, 0.0), value
    sinks = kwargs["s_aux"].float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], value


def _explain(path: str, weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor) -> None:
    """Refuse to score an attention that softmax(QK)V does not reproduce."""
    rows = ~(weights.sum(-1, keepdim=True) <= 0.5)
    expected = (weights @ values).masked_fill(~rows, 0.0)
    got = output.transpose(1, 2).float().masked_fill(~rows, 0.0)
    tolerance = 2e-2 if output.dtype.itemsize == 2 else 1e-3
    if not got.isfinite().all() or not weights.isfinite().all():
        raise ModelError(f"the attention in {path} gives NaN or infinity; look for NaN or huge values in the weights")
    if (expected - got).abs().max() > tolerance * max(1.0, float(got.abs().max())):
        raise ModelError(
            f"the attention in {path} is not softmax(QK)V alone, so its heads cannot be scored by it; "
            "use magnitude, gradient, taylor, fisher or activation"
        )


def _add(
    tally: Tally,
    axis: str,
    needs: set[str],
    weights: torch.Tensor,
    values: torch.Tensor,
    grams: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Sum each wanted quantity over real query tokens: (batch, heads, queries) -> (heads,)."""
    alive = torch.ones(weights.shape[0], weights.shape[2], device=weights.device) if mask is None else mask.float()
    count = float(alive.sum())

    def put(quantity: str, per_query: torch.Tensor) -> None:
        if quantity in needs:
            tally.add(quantity, axis, torch.einsum("bhq,bq->h", per_query, alive).double().cpu().numpy(), count)

    put("attn_sum", weights.sum(-1))
    put("attn_mass", (weights @ values.norm(dim=-1, keepdim=True))[..., 0])
    put("attn_confidence", weights.amax(-1))
    put("attn_entropy", -torch.xlogy(weights, weights).sum(-1))
    if grams is not None:
        y = weights @ values
        put("attn_output", torch.einsum("bhqd,hde,bhqe->bhq", y, grams, y).clamp_min(0).sqrt())
