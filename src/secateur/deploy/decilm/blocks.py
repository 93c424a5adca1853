"""The layers of a decoder as DeciLM's `block_configs` can say them, and the tensors with those sizes.

DeciLM has one number of query heads and one size of head for all layers; a layer says how many query heads share a
key-value head (`n_heads_in_group`), how wide its feed-forward module is (`ffn_mult`), or that one of the two is gone
(`no_op`). What a decoder has less than that is filled up with zeros, which changes no output.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.deploy.gguf.decoder import ATTENTION, FEED_FORWARD, HEAD, WHOLE, Decoder, Form, Layer, filled
from secateur.deploy.target import DeployError

FORM = Form("DeciLM", "DeciLM", {"llama": "llama", "mistral": "llama"})
MULTIPLE = 256
"""Widths that `ffn_mult` says are multiples of this."""
DIGITS = 6
"""To how many decimals mlx-lm rounds `ffn_mult`."""


def check(model: nn.Module, decoder: Decoder) -> None:
    """DeployError for biases, for values of another size than keys, and for heads that turn at other frequencies than
    the base says. model: what the decoder was read from."""
    name, config = type(model).__name__, model.config
    biased = next((parameter for parameter in decoder.parameters if parameter.endswith(".bias")), None)
    if biased is not None:
        raise FORM.refusal(name, f"its runtimes differ in which layers have biases, and the model has {biased}")
    if decoder.key != decoder.value:
        raise FORM.refusal(
            name,
            f"its heads have {decoder.key} numbers for queries and keys and {decoder.value} for values, and DeciLM has "
            "one head_dim; prune whole heads",
        )
    rule: Any = getattr(config, "rope_parameters", None) or {}
    if decoder.factors is not None and rule.get("rope_type", "default") == "default":
        raise FORM.refusal(name, "its heads turn at other frequencies than its base gives; prune whole heads")


def fitted(decoder: Decoder, *, exact: bool = False) -> list[Layer]:
    """The sizes that are written: those of the decoder, filled up to what `block_configs` can say.

    exact: keep widths that are no multiples of `MULTIPLE`.

    The first layer always attends: without attention, vLLM and SGLang have no residual to add to there. Raises
    DeployError where no number of key-value heads fits a layer.
    """
    heads = max(layer.heads for layer in decoder.layers)
    layers = [
        Layer(
            heads if layer.heads else 0,
            _groups(i, layer, heads) if layer.heads else 0,
            layer.ffn if exact else -(-layer.ffn // MULTIPLE) * MULTIPLE,
        )
        for i, layer in enumerate(decoder.layers)
    ]
    if not layers[0].heads:
        layers[0] = Layer(heads, next(layer.kv for layer in layers if layer.kv), layers[0].ffn)
    return layers


def _groups(i: int, layer: Layer, heads: int) -> int:
    """The fewest key-value heads among which that many query heads can be divided so that the layer's fit in."""
    group = layer.heads // layer.kv
    for kv in range(layer.kv, heads // group + 1):
        if not heads % kv:
            return kv
    raise DeployError(
        f"layer {i} has {layer.heads} query heads on {layer.kv} key-value heads, which cannot be filled up to the "
        f"{heads} query heads that DeciLM has in all layers; keep a number of key-value heads that divides {heads}"
    )


def ffn_mult(width: int, hidden: int) -> float:
    """The multiplier that says a width, a multiple of `MULTIPLE`; cut off after `DIGITS`, because a reader rounds a
    larger width up to the next multiple."""
    return math.floor(1.5 * width / hidden * 10**DIGITS) / 10**DIGITS


def width_of(multiplier: float, hidden: int) -> int:
    """The width that vLLM, SGLang and mlx-lm read from `ffn_mult`: rounded up to a multiple of `MULTIPLE`."""
    return -(-int(2 * multiplier * hidden / 3) // MULTIPLE) * MULTIPLE


def block_configs(layers: Sequence[Layer], hidden: int, *, exact: bool = False) -> list[dict[str, Any]]:
    """What config.json says of the layers, with sizes as `fitted` gives them."""

    def feed_forward(width: int) -> dict[str, Any]:
        if exact:
            return {"intermediate_size": width or None}
        return {"ffn_mult": ffn_mult(width, hidden) if width else None}

    def part(size: int, **says: Any) -> dict[str, Any]:
        return {"no_op": not size, "replace_with_linear": False, **says}

    return [
        {
            "attention": part(layer.heads, n_heads_in_group=layer.heads // layer.kv if layer.heads else None),
            "ffn": part(layer.ffn, **feed_forward(layer.ffn)),
        }
        for layer in layers
    ]


def tensors(decoder: Decoder, layers: Sequence[Layer]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder by their names there, which are Llama's. layers: sizes, as `fitted` gives them."""
    given = decoder.parameters
    yield from ((name, given[name]) for name in (*WHOLE, HEAD) if name in given)
    for i, (layer, old) in enumerate(zip(layers, decoder.layers, strict=True)):
        prefix = f"model.layers.{i}."
        own = {name: given[prefix + name] for name in (*ATTENTION, *FEED_FORWARD) if prefix + name in given}
        if layer.heads:
            for name, tensor in _attention(decoder, own, old, layer):
                yield prefix + name, tensor
        if layer.ffn:
            yield f"{prefix}post_attention_layernorm.weight", own["post_attention_layernorm.weight"]
            for name in ("gate", "up", "down"):
                shape = (decoder.hidden, layer.ffn) if name == "down" else (layer.ffn, decoder.hidden)
                yield f"{prefix}mlp.{name}_proj.weight", filled(own[f"mlp.{name}_proj.weight"], shape)


def _attention(
    decoder: Decoder, own: Mapping[str, torch.Tensor], old: Layer, new: Layer
) -> Iterator[tuple[str, torch.Tensor]]:
    given = own if old.heads else {}
    yield "input_layernorm.weight", own.get("input_layernorm.weight", torch.ones(decoder.hidden))
    query, output = given.get("self_attn.q_proj.weight"), given.get("self_attn.o_proj.weight")
    yield "self_attn.q_proj.weight", _spread(query, old, new, decoder)
    for name in "kv":
        rows = filled(given.get(f"self_attn.{name}_proj.weight"), (new.kv * decoder.key, decoder.hidden))
        yield f"self_attn.{name}_proj.weight", rows
    yield "self_attn.o_proj.weight", _spread(None if output is None else output.T, old, new, decoder).T


def _spread(rows: torch.Tensor | None, old: Layer, new: Layer, decoder: Decoder) -> torch.Tensor:
    """Rows of query heads (heads x size, hidden), each of which stays with its key-value head, among rows of zeros."""
    if rows is None or (old.heads, old.kv) == (new.heads, new.kv):
        return filled(rows, (new.heads * decoder.key, decoder.hidden))
    group = old.heads // old.kv
    zeros = torch.zeros(new.kv, new.heads // new.kv, decoder.key, decoder.hidden)
    zeros[: old.kv, :group] = rows.detach().reshape(old.kv, group, decoder.key, decoder.hidden)
    return zeros.reshape(-1, decoder.hidden)


def words(decoder: Decoder, layers: Sequence[Layer]) -> list[str]:
    """Sentences on what was filled up, and on runtimes that do not take these sizes."""
    sentences = list(decoder.notes)
    pairs = list(zip(decoder.layers, layers, strict=True))
    neurons = sum(new.ffn - old.ffn for old, new in pairs)
    if neurons:
        sentences.append(
            f"{neurons} neurons of zeros fill widths up to multiples of {MULTIPLE}, which ffn_mult can say; prune to "
            f"multiples of {MULTIPLE} to save them"
        )
    if not decoder.layers[0].heads:
        sentences.append("the first layer attends no more; it gets heads of zeros, which vLLM and SGLang want")
    queries = sum(new.heads - old.heads for old, new in pairs if old.heads)
    if queries:
        sentences.append(
            f"{queries} query heads and {sum(new.kv - old.kv for old, new in pairs if old.heads)} key-value heads of "
            f"zeros fill layers up to {layers[0].heads} query heads, as DeciLM has one number for all layers; they "
            "save nothing there"
        )
    if len({layer.kv for layer in layers if layer.kv}) > 1:
        sentences.append(
            "the number of key-value heads differs by layer, which SGLang refuses; keep equally many for it"
        )
    if layers[0].heads * decoder.key != decoder.hidden:
        sentences.append(
            f"{layers[0].heads} heads of {decoder.key} numbers are not the {decoder.hidden} of the residual stream, "
            "which mlx-lm's DeciLM wants"
        )
    return sentences
