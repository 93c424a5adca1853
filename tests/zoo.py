"""Tiny random models by name, what they are called with, and models whose weights hold zeros."""

from functools import partial

import torch
import transformers
from torch import nn

VOCAB = 50
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SMALL, "vocab_size": VOCAB}
_IMAGE = {**_SMALL, "image_size": 16, "patch_size": 8}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def both_sides(layers, heads, ffn):
    """Sizes of the encoder and of the decoder."""
    sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn}
    return {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}


# Models to be pruned and compiled. name: (class, config)
FAMILIES = {
    "bert": ("BertForSequenceClassification", {**_TEXT, "max_position_embeddings": 40}),
    "llama": (
        "LlamaForCausalLM",
        {
            **_TEXT,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "vit": ("ViTForImageClassification", {**_IMAGE, "num_labels": 3}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
        | {"num_heads": 4, "decoder_start_token_id": 0},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 24}
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64},
    ),
    "distilbert": ("DistilBertModel", {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "roberta": ("RobertaModel", {**_TEXT, "num_hidden_layers": 2, "max_position_embeddings": 60}),
    "albert": ("AlbertModel", {**_TEXT, "num_hidden_layers": 2, "hidden_act": "gelu"}),
    "dinov2": ("Dinov2Model", {**_IMAGE, "num_hidden_layers": 2}),
    "deit": ("DeiTModel", {**_IMAGE, "num_hidden_layers": 2}),
    "siglip": ("SiglipVisionModel", {**_IMAGE, "num_hidden_layers": 2}),
    "clip": ("CLIPVisionModel", {**_IMAGE, "num_hidden_layers": 2}),
    "whisper": (
        "WhisperModel",
        {**both_sides(2, 4, 48), "vocab_size": VOCAB, "d_model": 32, "max_source_positions": 20}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    ),
    "bart": ("BartModel", {**both_sides(2, 4, 48), "vocab_size": VOCAB, "d_model": 32}),
}


def build(name, cls=None, **options):
    """A family's model in evaluation mode; options: numbers of its config that differ."""
    usual, config = FAMILIES[name]
    return random_model(cls or usual, {**config, **options})


def random_model(cls, config):
    """A model of a class of transformers, with a fixed seed and in evaluation mode."""
    torch.manual_seed(0)
    cls = getattr(transformers, cls)
    return noisy(cls(cls.config_class(**config)))


def noisy(model):
    """Biases and norms are born constant, which would hide a wrong selection: every parameter gets some noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


bert, llama, vit, gpt2, t5, mixtral = (
    partial(build, name) for name in ("bert", "llama", "vit", "gpt2", "t5", "mixtral")
)


def inputs(model, seed=0):
    """What a model is called with: two sequences of 7 tokens, or two images."""
    generator, config, given = torch.Generator().manual_seed(seed), model.config, {}
    text, vision = (getattr(config, part, config) for part in ("text_config", "vision_config"))
    if hasattr(config, "num_mel_bins"):
        given["input_features"] = torch.randn(2, config.num_mel_bins, 18, generator=generator)
    elif hasattr(text, "vocab_size"):
        ids = torch.randint(3, text.vocab_size, (2, 7), generator=generator)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(vision, "image_size"):
        given["pixel_values"] = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, config.vocab_size, (2, 5), generator=generator)
    return given


def logits(model, seed=0):
    with torch.no_grad():
        return model(**inputs(model, seed)).logits


# -- zeros ----------------------------------------------------------------------------------------------------------


def kept(shape, density=0.2, pattern="element", generator=None):
    """Which weights (out, in) stay at random: single ones, keep:of along the inputs, or blocks of out x in."""
    rows, columns = shape[-2:]
    if ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        chosen = torch.rand(rows, -(-columns // of), of, generator=generator).argsort(-1) < keep
        return chosen.reshape(rows, -1)[:, :columns]
    if "x" in pattern:
        high, wide = map(int, pattern.split("x"))
        blocks = torch.rand(-(-rows // high), -(-columns // wide), generator=generator) < density
        return blocks.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    return torch.rand(shape, generator=generator) < density


def is_linear(module):
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)


def pruned(model, density=0.2, pattern="element", seed=0, only=is_linear):
    """The model, in evaluation mode, with zeros in the matrices of those modules that `only` takes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {id(w): w for m in model.modules() if only(m) for w in m.parameters(recurse=False) if w.dim() > 1}
    for weight in weights.values():
        weight.data.masked_fill_(~kept(weight.shape, density, pattern, generator), 0)  # and no -0.0
    return model.eval()


def plain(make, density=0.2, pattern="element"):
    """A module of plain PyTorch with random weights and zeros."""
    torch.manual_seed(0)
    return pruned(noisy(make()), density, pattern)


def linear(columns, rows, pattern="element", density=0.2):
    """A linear layer (rows, columns) with zeros."""
    return plain(lambda: nn.Linear(columns, rows), density, pattern)


# -- models to be traced --------------------------------------------------------------------------------------------


_ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 60,
    "max_position_embeddings": 30,
}
_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    **_SPECIAL,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
}


class Sentence(nn.Module):
    """A plain PyTorch encoder: token embedding, nn.TransformerEncoder, a head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(60, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, ids):
        return self.head(self.encoder(self.tokens(ids)).mean(1))


# Models whose layouts are kept in tests/golden. name: (class, config)
STRUCTURES = {
    "bert": ("BertForSequenceClassification", _ENCODER),
    "llama": ("LlamaForCausalLM", _GROUPED),
    "vit": ("ViTForImageClassification", _VISION),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32, **_SPECIAL},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
        | {"feed_forward_proj": "gated-gelu"},
    ),
    "albert": ("AlbertForMaskedLM", {**_ENCODER, **_SPECIAL, "embedding_size": 10}),
    # interleaved rotary pairs: units 2i and 2i + 1 of query and key are rotated together
    "roformer": ("RoFormerForMaskedLM", {**_ENCODER, **_SPECIAL, "embedding_size": 24}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**both_sides(2, 4, 40), **_SPECIAL, "d_model": 24, "vocab_size": 60, "num_mel_bins": 6}
        | {"max_source_positions": 9, "max_target_positions": 11, "decoder_start_token_id": 1},
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6}
        | {"norm_rel_ebd": "layer_norm"},
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _DECODER),
    "falcon": (
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 60}
        | {"new_decoder_architecture": True, **_SPECIAL},
    ),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, **_SPECIAL}),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        {**_DECODER, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 6, "v_head_dim": 5, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        | {"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 20},
    ),
    "dinov2": (
        "Dinov2Model",
        {**{k: v for k, v in _VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": {**_ENCODER, **_SPECIAL}, "vision_config": dict(_VISION), "projection_dim": 14},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 60, **_SPECIAL},
    ),
    "torch_encoder": (Sentence, {}),
}


def structure(name, **options):
    """A structure's model, in evaluation mode, and its example; options: numbers of its config that differ."""
    cls, config = STRUCTURES[name]
    if cls is Sentence:
        torch.manual_seed(0)
        return Sentence().eval(), (torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(0)),)
    model = random_model(cls, {**config, **options})
    return model, inputs(model)
