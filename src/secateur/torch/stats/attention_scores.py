"""Attention scores of a Hugging Face model, read through its `AttentionInterface`: no model is edited.

The observer computes the softmax weights beside torch's SDPA and checks that they explain its output. Where the model
caps its scores or has sinks, which SDPA cannot compute, the output is computed from the weights. A model that asks for
anything else is refused rather than scored wrongly.
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
"""Arguments of attention that ask for nothing beyond SDPA; `secateur.runtime` uses this list too."""

BY_WEIGHTS = ("softcap", "s_aux")
"""Arguments that `weights_of` takes and SDPA does not: a cap of the scores, and a sink for each head."""

EXPLAINED = {*KNOWN, *BY_WEIGHTS, "position_bias", "sliding_window", "cache_position", "num_items_in_batch"}
"""Arguments that `weights_of` takes into account, or that change no attention: a sliding window is in the mask too.
Flags (True, False) change none either.
"""


class _Observer:
    """Computes attention as torch's SDPA does, and adds the quantities in `needs` of each call to a tally."""

    def __init__(self, model: nn.Module, layout: Layout, needs: set[str], tally: Tally, token_mask: TokenMask) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward  # optional

        self.model, self.layout, self.needs, self.tally, self.token_mask = model, layout, needs, tally, token_mask
        self._sdpa = sdpa_attention_forward
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._heads: dict[str, tuple[Axis, torch.Tensor | None]] = {}

    def attend(
        self, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """The output of an attention module, as the attention interface of transformers asks for it."""
        path = self._paths.get(id(module))
        unknown = [n for n, v in kwargs.items() if v is not None and not isinstance(v, bool) and n not in EXPLAINED]
        if unknown:
            raise ModelError(
                f"the attention in {path or type(module).__name__} takes {unknown[0]!r}, which is not understood here, "
                "so its heads cannot be scored by it; use magnitude, gradient, taylor, fisher or activation"
            )
        if any(kwargs.get(name) is not None for name in BY_WEIGHTS):
            weights, values = weights_of(module, query, key, value, attention_mask, kwargs)
            output = (weights @ values).transpose(1, 2).to(query.dtype).contiguous()
        else:
            output, _ = self._sdpa(module, query, key, value, attention_mask, **kwargs)
        scored = self._scored(path, query.shape[1]) if path is not None else None
        if path is not None and scored is not None:
            axis, grams = scored
            with torch.no_grad():
                weights, values = weights_of(module, query, key, value, attention_mask, kwargs)
                _explain(path, weights, values, output)
                mask = self.token_mask(path, (query.shape[0], query.shape[2]))
                _add(self.tally, axis.name, self.needs, weights, values, grams, mask)
        return output, None

    def _scored(self, path: str, heads: int) -> tuple[Axis, torch.Tensor | None] | None:
        """The axis of the heads of a module, and `_output_grams` where they are needed; None without such an axis."""
        if path not in self._heads:
            axis = _head_axis(self.layout, path, heads)
            if axis is None:
                return None
            with_output = "attn_output" in self.needs
            self._heads[path] = (axis, _output_grams(self.model, self.layout, axis, path) if with_output else None)
        return self._heads[path]


@contextlib.contextmanager
def observe_attention(
    model: nn.Module, layout: Layout, needs: set[str], tally: Tally, token_mask: TokenMask
) -> Iterator[None]:
    """While the context lasts, every forward pass adds the attention quantities in `needs` to `tally`.

    Raises ModelError when the model does not use the attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # optional
    from transformers.masking_utils import sdpa_mask

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "attention scores are read through the attention interface of transformers, which a "
            f"{type(model).__name__} does not have; use magnitude, gradient, taylor, fisher or activation"
        )
    observer = _Observer(model, layout, needs, tally, token_mask)
    before = _implementations(model)
    AttentionInterface.register(NAME, observer.attend)
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
    """Every config in the model, with its attention implementation, which can then be restored."""
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            parts = (getattr(config, key, None) for key in getattr(config, "sub_configs", {}))
            for part in (config, *parts):
                if part is not None and hasattr(part, "_attn_implementation_internal"):
                    configs[id(part)] = (part, part._attn_implementation_internal)
    return list(configs.values())


def _head_axis(layout: Layout, path: str, size: int) -> Axis | None:
    """The axis of `size` query heads whose projections lie under the attention module at `path`, or None."""
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
    """How many parts of two module paths are the same, from the start."""
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


def weights_of(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights (batch, heads, queries, keys), and values repeated for the query heads, both float32.

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
    """ModelError for an attention whose output softmax(QK)V does not reproduce."""
    rows = ~(weights.sum(-1, keepdim=True) <= 0.5)
    expected = (weights @ values).masked_fill(~rows, 0.0)
    computed = output.transpose(1, 2).float().masked_fill(~rows, 0.0)
    tolerance = 2e-2 if output.dtype.itemsize == 2 else 1e-3
    if not computed.isfinite().all() or not weights.isfinite().all():
        raise ModelError(f"the attention in {path} gives NaN or infinity; look for NaN or huge values in the weights")
    if (expected - computed).abs().max() > tolerance * max(1.0, float(computed.abs().max())):
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
    """Add each quantity in `needs`, summed over real query tokens: (batch, heads, queries) -> (heads,).

    weights, values: of `weights_of`; grams: of `_output_grams`; mask (batch, queries): the real tokens, None for all.
    """
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
