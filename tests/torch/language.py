"""Tiny language models as folders with a tokenizer of whole words, and text for them."""

import random

import torch

from secateur.recipe import make_recipe
from tests import zoo

WORDS = [f"w{i}" for i in range(zoo.VOCAB - 4)]


def write_model(folder, make=zoo.llama, shard="20KB", **options):
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
    return torch.randint(3, zoo.VOCAB, (count, context), generator=torch.Generator().manual_seed(seed))


def files(folder):
    """Every file under a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def recipe(**values):
    """SparseGPT 2:4 on windows like those above."""
    return make_recipe(**{"criterion": "sparsegpt", "pattern": "2:4", "samples": 6, "context": 16, **values})


def same(model, folder):
    """Whether a folder loads to the weights of a model, to the last bit."""
    again = type(model).from_pretrained(folder).state_dict()
    return again.keys() == model.state_dict().keys() and all(
        torch.equal(value, again[name]) for name, value in model.state_dict().items()
    )


class Stop(Exception):
    """What stops a run in a test."""


def stopped_after(number):
    """A progress that raises Stop when so many blocks are done."""

    def progress(done):
        if done.number == number:
            raise Stop

    return progress
