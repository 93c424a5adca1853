"""Tiny decoders with sizes by layer, and tokenizers that llama.cpp has."""

import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.deploy.gguf.vocabulary import SPLITS

from ... import zoo

TEXTS = ("the quick brown fox jumps over the lazy dog", "it's 10 of 1234 dogs, and they're fine", "größer ist größer")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def byte_level(pre="gpt-2", size=320, **options):
    """A byte-level tokenizer trained on `TEXTS`, which splits them as `pre` does."""
    raw = Tokenizer(models.BPE())
    rule = next(rule for rule, name in SPLITS.items() if name == pre)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if "digits" in rule else []
    steps += [pre_tokenizers.Split(Regex(part), "isolated") for part in rule if part not in ("digits", "gpt2")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in rule))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|start|>"]
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|start|>", **options)


def sentencepiece():
    """A byte-pair tokenizer as Llama 2 has: blanks are a letter, and unknown letters become bytes."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learnt = raw.get_vocab()
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in sorted(learnt, key=learnt.get) if token not in tokens]
    if "▁" not in tokens:
        tokens.append("▁")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def decoder(family="Llama", layers=3, vocabulary=330, **options):
    """A random model of a family; its vocabulary has some tokens more than the tokenizers."""
    config = {**SIZES, "num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": 128, **options}
    return zoo.random_model(f"{family}ForCausalLM", config)


def cut(model, sizes):
    """The model with other sizes in each layer: (key-value heads, neurons), the first ones of which stay."""
    with torch.no_grad():
        for layer, (kv, ffn) in zip(model.model.layers, sizes, strict=True):
            attention, heads = layer.self_attn, kv * layer.self_attn.num_key_value_groups
            size = attention.head_dim
            for name, rows in (("q_proj", heads * size), ("k_proj", kv * size), ("v_proj", kv * size)):
                _rows(getattr(attention, name), rows)
            _columns(attention.o_proj, heads * size)
            _rows(layer.mlp.gate_proj, ffn)
            _rows(layer.mlp.up_proj, ffn)
            _columns(layer.mlp.down_proj, ffn)
    return model


def _rows(linear, count):
    linear.weight = torch.nn.Parameter(linear.weight[:count].clone())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias[:count].clone())
    linear.out_features = count


def _columns(linear, count):
    linear.weight = torch.nn.Parameter(linear.weight[:, :count].clone())
    linear.in_features = count


def greedy(model, prompt, count):
    """The new tokens that PyTorch writes after a prompt; a text never ends."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()
