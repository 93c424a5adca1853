"""Tiny random models of many structures, for tests of tracing: name -> (model, example)."""

import torch
import transformers as tf
from torch import nn

from secateur.torch.host import TorchHost
from tests.torch.exact import randomize

VOCAB = 60
HOSTS: dict[str, TorchHost] = {}


def _ids(length=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCAB, (2, length), generator=generator)


def text():
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pair():
    return {**text(), "decoder_input_ids": _ids(5)}


def image(size=8):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": 30,
}
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER)), text()


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)), text()


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**_VISION)), image()


def gpt2():
    config = tf.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=32, **_SPECIAL)
    return tf.GPT2LMHeadModel(config), text()


def t5():
    config = tf.T5Config(
        d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, vocab_size=VOCAB, feed_forward_proj="gated-gelu"
    )
    return tf.T5ForConditionalGeneration(config), pair()


def albert():
    config = tf.AlbertConfig(**_ENCODER, embedding_size=10, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    return tf.AlbertForMaskedLM(config), text()


def roformer():
    """Interleaved rotary pairs: units 2i and 2i + 1 of query and key turn together."""
    return tf.RoFormerForMaskedLM(tf.RoFormerConfig(**_ENCODER, embedding_size=24, **_SPECIAL)), text()


def whisper():
    config = tf.WhisperConfig(
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        vocab_size=VOCAB,
        num_mel_bins=6,
        max_source_positions=9,
        max_target_positions=11,
        decoder_start_token_id=1,
        **_SPECIAL,
    )
    features = torch.randn(2, 6, 18, generator=torch.Generator().manual_seed(0))
    return tf.WhisperForConditionalGeneration(config), {"input_features": features, "decoder_input_ids": _ids(5)}


def deberta():
    config = tf.DebertaV2Config(
        **_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=6, norm_rel_ebd="layer_norm"
    )
    return tf.DebertaV2ForSequenceClassification(config), text()


def swin():
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return tf.SwinForImageClassification(config), image(16)


def gpt_neox():
    config = tf.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB, **_SPECIAL
    )
    return tf.GPTNeoXForCausalLM(config), text()


def falcon():
    config = tf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        vocab_size=VOCAB,
        **_SPECIAL,
    )
    return tf.FalconForCausalLM(config), text()


def bloom():
    config = tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB, **_SPECIAL)
    return tf.BloomForCausalLM(config), text()


def phi3():
    return tf.Phi3ForCausalLM(tf.Phi3Config(**_DECODER)), text()


def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER)), text()


def gemma2():
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**_DECODER, sliding_window=4)), text()


def mixtral():
    config = tf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config), text()


def deepseek():
    config = tf.DeepseekV3Config(
        **{k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=5,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=20,
    )
    return tf.DeepseekV3ForCausalLM(config), text()


def dinov2():
    options = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
    return tf.Dinov2Model(tf.Dinov2Config(**options, mlp_ratio=2)), image()


def clip():
    config = tf.CLIPConfig(text_config={**_ENCODER, **_SPECIAL}, vision_config=dict(_VISION), projection_dim=14)
    return tf.CLIPModel(config), {**text(), **image()}


def mamba():
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=VOCAB, **_SPECIAL)
    return tf.MambaForCausalLM(config), text()


class Sentence(nn.Module):
    """A plain PyTorch encoder: token embedding, nn.TransformerEncoder, a head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, ids):
        return self.head(self.encoder(self.tokens(ids)).mean(1))


def torch_encoder():
    return Sentence(), (_ids(),)


FAMILIES = {
    make.__name__: make
    for make in (
        bert,
        llama,
        vit,
        gpt2,
        t5,
        albert,
        roformer,
        whisper,
        deberta,
        swin,
        gpt_neox,
        falcon,
        bloom,
        phi3,
        qwen3,
        gemma2,
        mixtral,
        deepseek,
        dinov2,
        clip,
        mamba,
        torch_encoder,
    )
}


def make(name):
    """A family's model with a fixed seed, in evaluation mode, and its example."""
    torch.manual_seed(0)
    model, example = FAMILIES[name]()
    return model.eval(), example


def host_of(name, **config):
    """A host of its own with random weights, of a model that is traced once in a run; config: numbers to be changed."""
    key = f"{name} {config}"
    if key not in HOSTS:
        model, example = make(name)
        if config:
            torch.manual_seed(0)
            model = type(model)(type(model.config)(**{**model.config.to_diff_dict(), **config})).eval()
        HOSTS[key] = TorchHost(randomize(model), example)
    return HOSTS[key].copy()
