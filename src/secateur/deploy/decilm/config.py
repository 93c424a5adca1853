"""What config.json of a DeciLM folder says."""

from collections.abc import Sequence
from typing import Any

from secateur.deploy.decilm.blocks import block_configs
from secateur.deploy.decilm.config_class import MODEL_TYPE
from secateur.deploy.gguf.decoder import Decoder, Layer

ARCHITECTURE = "DeciLMForCausalLM"


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
