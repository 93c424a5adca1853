"""What llama.cpp has to know of a decoder: its sizes in each layer, its rotary frequencies, and which parameter becomes
which tensor. Everything is read off the parameters; a model with parameters that have no place there is refused.

llama.cpp's architectures `llama` and `qwen2` take one number of heads and one width for all layers. `deci` is the same
computation with sizes by layer and optional biases, so an unevenly pruned model is written as `deci`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.deploy.target import DeployError

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""`model_type` of transformers -> the architecture of llama.cpp that computes it when all layers have one size."""
UNEVEN = "deci"
"""The architecture with sizes by layer."""
ROTARY = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose frequencies are the same at every length, and which scale nothing else."""
ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    **{f"self_attn.{name}_proj.{part}": f"attn_{name}.{part}" for name in "qkv" for part in ("weight", "bias")},
    **{f"self_attn.o_proj.{part}": f"attn_output.{part}" for part in ("weight", "bias")},
}
FEED_FORWARD = {
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"mlp.{name}_proj.{part}": f"ffn_{name}.{part}"
        for name in ("gate", "up", "down")
        for part in ("weight", "bias")
    },
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
HEAD = "lm_head.weight"
INSTEAD = "; export it to onnx or openvino instead"


@dataclass(frozen=True)
class Form:
    """What decoders are written as: its name, who computes it, and the families that can be."""

    name: str
    reader: str
    families: Mapping[str, str]

    def refusal(self, model: str, reason: str) -> DeployError:
        """Why a model cannot be written so, and what to do."""
        return DeployError(f"{model} cannot be written as {self.name}: {reason}{INSTEAD}")


GGUF = Form("GGUF", "llama.cpp", FAMILIES)


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer: query heads, key-value heads, and neurons of the feed-forward module; 0 where it is gone."""

    heads: int
    kv: int
    ffn: int


@dataclass(frozen=True)
class Decoder:
    """A decoder that llama.cpp can compute.

    key, value: size of a head for queries and keys, and for values.
    context: most tokens. theta: base of the rotary frequencies.
    factors: (key / 2,) what divides each rotary frequency; None where all are 1.
    parameters: name in the model -> array, without those of tied embeddings.
    notes: sentences for the user.
    """

    architecture: str
    layers: list[Layer]
    hidden: int
    vocabulary: int
    key: int
    value: int
    context: int
    theta: float
    epsilon: float
    factors: np.ndarray | None
    parameters: Mapping[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def tied(self) -> bool:
        """Whether the output layer reads the token embeddings."""
        return HEAD not in self.parameters


def decoder_of(model: nn.Module, form: Form = GGUF) -> Decoder:
    """Read a model of transformers; DeployError, in one sentence, for what the Llama of that form does not compute."""
    config: Any = getattr(model, "config", None)
    family = str(getattr(config, "model_type", None))
    name = type(model).__name__
    if family not in form.families or HEAD not in {k for k, _ in model.named_parameters(remove_duplicate=False)}:
        raise form.refusal(name, f"decoders of the families {', '.join(form.families)} can")
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if parameters[HEAD] is parameters["model.embed_tokens.weight"]:
        del parameters[HEAD]
    modules: Any = model.get_submodule("model.layers")
    _check_names(form, name, parameters, len(modules))
    _check_config(form, name, config)
    key, value = _head_sizes(form, name, modules, parameters)
    parameters |= _scaled(modules, parameters, key)
    layers = [_layer(form, i, parameters, key) for i in range(len(modules))]
    theta, factors = _frequencies(form, name, model, config, key)
    context, notes = _context(form, config)
    embedding = parameters["model.embed_tokens.weight"]
    biased = _biased(parameters)
    return Decoder(
        _architecture(form.families[family], layers, biased, scaled=factors is not None),
        layers,
        embedding.shape[1],
        embedding.shape[0],
        key,
        value,
        context,
        theta,
        float(config.rms_norm_eps),
        factors,
        parameters,
        notes,
    )


def _check_names(form: Form, name: str, parameters: Mapping[str, torch.Tensor], count: int) -> None:
    known = {*WHOLE, HEAD} | {
        f"model.layers.{i}.{part}" for i in range(count) for part in {**ATTENTION, **FEED_FORWARD}
    }
    strange = next((parameter for parameter in parameters if parameter not in known), None)
    if strange is not None:
        raise form.refusal(name, f"{form.reader}'s Llama has no {strange}")


def _check_config(form: Form, name: str, config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise form.refusal(name, f"{form.reader}'s Llama computes SiLU, not {config.hidden_act}")


def _head_sizes(form: Form, name: str, modules: Any, parameters: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Size of the heads for keys and for values, which must be the same in all layers that attend."""
    found: set[tuple[int, int]] = set()
    for i, module in enumerate(modules):
        keys = parameters.get(f"model.layers.{i}.self_attn.k_proj.weight")
        if keys is None or not keys.shape[0]:
            continue
        attention = module.self_attn
        key = int(attention.head_dim)
        kv = keys.shape[0] // key
        values = parameters[f"model.layers.{i}.self_attn.v_proj.weight"].shape[0]
        if kv * key != keys.shape[0] or values % kv:
            raise form.refusal(
                name, f"layer {i} has keys of {keys.shape[0]} numbers in heads of {key}; prune whole heads"
            )
        found.add((key, values // kv))
    if len(found) > 1:
        raise form.refusal(
            name,
            f"its heads have {' and '.join(str(k) for k, _ in sorted(found))} numbers in different layers, and "
            f"{form.reader} takes one size; prune whole heads",
        )
    if not found:
        raise form.refusal(name, f"no layer attends, and {form.reader} wants one that does")
    return next(iter(found))


def _scaled(modules: Any, parameters: Mapping[str, torch.Tensor], key: int) -> dict[str, torch.Tensor]:
    """The query projections of layers that scale their attention by another number than one over the root of `key`,
    such as those whose heads have lost some of their numbers: multiplied so that the usual number is right."""
    found = {}
    for i, module in enumerate(modules):
        for name in (f"model.layers.{i}.self_attn.q_proj.{part}" for part in ("weight", "bias")):
            if name not in parameters:
                continue
            ratio = float(module.self_attn.scaling) * key**0.5
            if abs(ratio - 1) > 1e-6:
                found[name] = parameters[name].detach() * ratio
    return found


def _layer(form: Form, i: int, parameters: Mapping[str, torch.Tensor], key: int) -> Layer:
    def rows(part: str) -> int:
        weight = parameters.get(f"model.layers.{i}.{part}.weight")
        return 0 if weight is None else weight.shape[0]

    heads, kv, ffn = rows("self_attn.q_proj") // key, rows("self_attn.k_proj") // key, rows("mlp.gate_proj")
    if not heads or not kv:
        return Layer(0, 0, ffn)
    if heads % kv:
        raise DeployError(
            f"layer {i} has {heads} heads on {kv} key-value heads, and {form.reader} wants equally many on each; prune "
            "whole groups"
        )
    return Layer(heads, kv, ffn)


def _frequencies(form: Form, name: str, model: nn.Module, config: Any, key: int) -> tuple[float, np.ndarray | None]:
    """The base of the rotary frequencies, and by what each of the model's own differs from what the base gives."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    rule: Any = getattr(config, "rope_parameters", None) or {}
    kind = rule.get("rope_type", "default")
    own = rotary.inv_freq.detach().double().numpy()
    if kind not in ROTARY or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise form.refusal(name, f"its rotary embedding is of the kind {kind}; {', '.join(ROTARY)} are written")
    if 2 * own.size != key:
        raise form.refusal(
            name,
            f"its rotary embedding turns {2 * own.size} of the {key} numbers of a head, and {form.reader} turns all",
        )
    theta = float(rule["rope_theta"])
    factors = theta ** (-np.arange(0, key, 2) / key) / own
    return theta, None if np.allclose(factors, 1.0, rtol=1e-5) else factors.astype(np.float32)


def _context(form: Form, config: Any) -> tuple[int, list[str]]:
    """Most tokens, and a sentence where a sliding window, which such a Llama does not have, cuts them."""
    most, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and window and window < most:
        return int(window), [
            f"the context is cut from {most} to {window} tokens: beyond, the model attends in a sliding window, which "
            f"{form.reader}'s Llama does not have"
        ]
    return most, []


def _biased(parameters: Mapping[str, torch.Tensor]) -> set[str]:
    """The kinds of parameters that are biases, such as `attn_q.bias`."""
    parts = {**ATTENTION, **FEED_FORWARD}
    return {parts[name.split(".", 3)[3]] for name in parameters if name.endswith(".bias")}


def _architecture(usual: str, layers: list[Layer], biased: set[str], *, scaled: bool) -> str:
    """`llama` or `qwen2` where they can hold the model, else `deci`."""
    uneven = len(set(layers)) > 1 or not layers[0].heads or not layers[0].ffn
    qkv = {"attn_q.bias", "attn_k.bias", "attn_v.bias"}
    fits = biased == qkv and not scaled if usual == "qwen2" else True
    return UNEVEN if uneven or not fits else usual


# -- tensors ----------------------------------------------------------------------------------------------------------


def written_name(parameter: str) -> str:
    """The name in a GGUF file of one of a decoder's `parameters`."""
    if parameter in WHOLE or parameter == HEAD:
        return {**WHOLE, HEAD: "output.weight"}[parameter]
    _, _, i, part = parameter.split(".", 3)
    return f"blk.{i}.{({**ATTENTION, **FEED_FORWARD})[part]}"


def padded_heads(decoder: Decoder) -> list[Layer]:
    """The layers as they are written, before neurons are padded: llama.cpp wants attention in the first layer, which
    gets one head of zeros if it has none, and is wrong about a layer without neurons, which gets one of zeros."""
    first = decoder.layers[0]
    layers = [first if first.heads else Layer(1, 1, first.ffn), *decoder.layers[1:]]
    return [Layer(layer.heads, layer.kv, max(1, layer.ffn)) for layer in layers]


def tensors(decoder: Decoder, layers: list[Layer]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a GGUF file in order, by their names there, in float32.

    layers: sizes to write; what they have more than the model is zero.
    """
    given = decoder.parameters
    for name, written in WHOLE.items():
        yield written, given[name]
    if not decoder.tied:
        yield written_name(HEAD), given[HEAD]
    if decoder.factors is not None:
        yield "rope_freqs.weight", torch.from_numpy(decoder.factors)
    for i, layer in enumerate(layers):
        own = {
            name: given[f"model.layers.{i}.{name}"]
            for name in {**ATTENTION, **FEED_FORWARD}
            if f"model.layers.{i}.{name}" in given
        }
        if layer.heads:
            for written, tensor in _attention(decoder, own, decoder.layers[i], layer):
                yield f"blk.{i}.{written}", tensor
        for written, tensor in _feed_forward(decoder, own, layer.ffn):
            yield f"blk.{i}.{written}", tensor


def _attention(
    decoder: Decoder, own: Mapping[str, torch.Tensor], model: Layer, layer: Layer
) -> Iterator[tuple[str, torch.Tensor]]:
    sizes = {"q": layer.heads * decoder.key, "k": layer.kv * decoder.key, "v": layer.kv * decoder.value}
    yield "attn_norm.weight", own.get("input_layernorm.weight", torch.ones(decoder.hidden))
    turned = decoder.architecture != "qwen2"
    for name, rows in sizes.items():
        for part in ("weight", "bias"):
            shape = (rows, decoder.hidden) if part == "weight" else (rows,)
            tensor = own.get(f"self_attn.{name}_proj.{part}")
            if tensor is None and part == "bias":
                continue
            tensor = filled(tensor, shape)
            if name in "qk" and turned and model.heads:
                tensor = interleaved(tensor, rows // decoder.key)
            yield f"attn_{name}.{part}", tensor
    yield (
        "attn_output.weight",
        filled(own.get("self_attn.o_proj.weight"), (decoder.hidden, layer.heads * decoder.value)),
    )
    if "self_attn.o_proj.bias" in own:
        yield "attn_output.bias", own["self_attn.o_proj.bias"]


def _feed_forward(decoder: Decoder, own: Mapping[str, torch.Tensor], ffn: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield "ffn_norm.weight", own.get("post_attention_layernorm.weight", torch.ones(decoder.hidden))
    for name in ("gate", "up", "down"):
        shape = (decoder.hidden, ffn) if name == "down" else (ffn, decoder.hidden)
        yield f"ffn_{name}.weight", filled(own.get(f"mlp.{name}_proj.weight"), shape)
        bias = own.get(f"mlp.{name}_proj.bias")
        if bias is not None:
            yield f"ffn_{name}.bias", filled(bias, shape[:1])


def filled(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in the corner of zeros of that shape."""
    if tensor is not None and tuple(tensor.shape) == shape:
        return tensor
    zeros = torch.zeros(shape)
    if tensor is not None:
        zeros[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
    return zeros


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys (heads x size, ...) in llama.cpp's order: it turns neighbours, numbers 2i and 2i + 1 of a
    head, where transformers turns i and i + size / 2."""
    size = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
