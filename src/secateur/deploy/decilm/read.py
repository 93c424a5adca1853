"""Computes a DeciLM folder from its files alone, with the layers of transformers' Llama, to compare it.

Sizes come from `block_configs` by the rules of the published runtimes; a tensor that is missing, left over or of
another shape is an error.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from secateur.deploy.decilm.blocks import width_of
from secateur.deploy.target import DeployError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class _Reader:
    """The tensors of a folder, each of which is read once."""

    def __init__(self, folder: Path) -> None:
        self.file: Any = safe_open(str(folder / WEIGHTS), framework="pt")
        self.left = set(self.file.keys())

    def take(self, name: str) -> torch.Tensor:
        """A tensor in float32."""
        if name not in self.left:
            raise DeployError(f"{WEIGHTS} has no tensor {name}, which config.json wants")
        self.left.remove(name)
        return self.file.get_tensor(name).float()

    def fill(self, module: nn.Module, prefix: str) -> nn.Module:
        """A module on the meta device with the tensors of that prefix."""
        values = {name: self.take(f"{prefix}.{name}") for name in module.state_dict()}
        try:
            module.load_state_dict(values, assign=True)
        except RuntimeError as error:
            raise DeployError(f"{WEIGHTS} has tensors of other shapes than config.json says for {prefix}") from error
        return module.eval()


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits (batch, length, vocabulary) of ids (batch, length), in float32; DeployError for a damaged folder."""
    said = json.loads((folder / CONFIG).read_text())
    reader = _Reader(folder)
    embedding = reader.take("model.embed_tokens.weight")
    hidden = embedding[ids]
    positions = torch.arange(ids.shape[1])[None]
    turned = LlamaRotaryEmbedding(_config(said))(hidden, positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
    for i, block in enumerate(said["block_configs"]):
        prefix = f"model.layers.{i}"
        attention, ffn = block["attention"], block["ffn"]
        if not attention["no_op"]:
            kv = said["num_attention_heads"] // attention["n_heads_in_group"]
            module, norm = _built(reader, prefix, "self_attn", _config(said, num_key_value_heads=kv))
            hidden = hidden + module(norm(hidden), position_embeddings=turned, attention_mask=mask)[0]
        if not ffn["no_op"]:
            width = width_of(ffn["ffn_mult"], said["hidden_size"]) if "ffn_mult" in ffn else ffn["intermediate_size"]
            module, norm = _built(reader, prefix, "mlp", _config(said, intermediate_size=width))
            hidden = hidden + module(norm(hidden))
    with torch.device("meta"):
        last: nn.Module = LlamaRMSNorm(said["hidden_size"], said["rms_norm_eps"])
    hidden = reader.fill(last, "model.norm")(hidden)
    head = embedding if said["tie_word_embeddings"] else reader.take("lm_head.weight")
    if reader.left:
        raise DeployError(f"{WEIGHTS} has {min(reader.left)}, which config.json does not know")
    return hidden @ head.T


def _config(said: dict[str, Any], **sizes: int) -> Any:
    """Llama's config for the sizes of one layer; attention is computed step by step."""
    names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act")
    rope = {"rope_type": "default", **(said["rope_scaling"] or {}), "rope_theta": said["rope_theta"]}
    config = LlamaConfig(**{name: said[name] for name in names}, **sizes, rope_parameters=rope)
    config._attn_implementation = "eager"
    return config


def _built(reader: _Reader, prefix: str, part: str, config: Any) -> tuple[nn.Module, nn.Module]:
    """Attention or the feed-forward module of a layer, and the norm before it."""
    with torch.device("meta"):
        module = LlamaAttention(config, layer_idx=0) if part == "self_attn" else LlamaMLP(config)
        norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    before = "input_layernorm" if part == "self_attn" else "post_attention_layernorm"
    return reader.fill(module, f"{prefix}.{part}"), reader.fill(norm, f"{prefix}.{before}")
