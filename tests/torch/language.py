"""Tiny language models as folders with a tokenizer of whole words, and text for them."""

import random

import torch

from tests.torch import tiny

WORDS = [f"w{i}" for i in range(tiny.VOCAB - 4)]


def write_model(folder, make=tiny.llama, shard="20KB", **options):
    """A random model in several shards, with its tokenizer; returns the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = make(**options)
    model.save_pretrained(folder, max_shard_size=shard)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=10**6
    )
    tokenizer.save_pretrained(folder)
    return model


def write_text(path, documents=40, words=20, seed=0):
    """A document on each line."""
    rng = random.Random(seed)
    path.write_text("\n".join(" ".join(rng.choices(WORDS, k=words)) for _ in range(documents)) + "\n")
    return path


def windows(count=6, context=16, seed=0):
    """Random calibration windows."""
    return torch.randint(3, tiny.VOCAB, (count, context), generator=torch.Generator().manual_seed(seed))


def files(folder):
    """Every file under a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
