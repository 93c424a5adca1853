"""config.json of a DeciLM folder, and the class with which transformers, and so vLLM and SGLang, can open it.

The class needs transformers only. DeciLM is no model of transformers: published folders bring the class as code of
their own. Ours bring no code; `register_decilm` makes the class known instead.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, LlamaConfig

from secateur.deploy.decilm.blocks import block_configs
from secateur.deploy.gguf.decoder import Decoder, Layer

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"


class DeciLMConfig(LlamaConfig):
    """Llama's config with `block_configs`, whose entries are read as attributes: `block.attention.no_op`."""

    model_type = MODEL_TYPE

    def __init__(self, block_configs: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [named(block) for block in block_configs]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the blocks as in the file."""
        return {**super().to_dict(), "block_configs": [plain(block) for block in self.block_configs]}


def named(value: Any) -> Any:
    """Dictionaries as objects with attributes."""
    return SimpleNamespace(**{k: named(v) for k, v in value.items()}) if isinstance(value, dict) else value


def plain(value: Any) -> Any:
    """Objects with attributes as dictionaries."""
    return {k: plain(v) for k, v in vars(value).items()} if isinstance(value, SimpleNamespace) else value


def register_decilm() -> None:
    """Make `AutoConfig` of this process open DeciLM folders."""
    AutoConfig.register(MODEL_TYPE, DeciLMConfig, exist_ok=True)


def config_of(own: Any, decoder: Decoder, layers: Sequence[Layer], dtype: str, *, exact: bool) -> dict[str, Any]:
    """What config.json says.

    own: the model's config. layers: sizes as `blocks.fitted` gives them.
    The rotary embedding is said by `rope_theta` and `rope_scaling`, the names that all runtimes read.
    """
    rule = dict(getattr(own, "rope_parameters", None) or {})
    theta = rule.pop("rope_theta", decoder.theta)
    scaled = rule.get("rope_type", "default") != "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": decoder.vocabulary,
        "hidden_size": decoder.hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": layers[0].heads,
        "num_key_value_heads": max(layer.kv for layer in layers),
        "intermediate_size": max(layer.ffn for layer in layers),
        "head_dim": decoder.key,
        "block_configs": block_configs(layers, decoder.hidden, exact=exact),
        "hidden_act": "silu",
        "max_position_embeddings": decoder.context,
        "rms_norm_eps": decoder.epsilon,
        "rope_theta": theta,
        "rope_scaling": rule if scaled else None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": decoder.tied,
        "torch_dtype": dtype,
        **{f"{token}_token_id": getattr(own, f"{token}_token_id", None) for token in ("bos", "eos", "pad")},
    }
