"""Tiny models with a tokenizer of whole words, as folders, and texts for them: classifiers and language models."""

import csv
import random

from tests import zoo

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "awful", "dull", "poor"]
PLAIN = ["film", "plot", "actor", "scene", "the", "a", "is", "was", "and", "with"]
NUMBERED = [f"w{i}" for i in range(zoo.VOCAB - 4)]


def tokenizer_of(words, *special, **options):
    """A tokenizer of whole words; the first of the special tokens pads, the second stands for unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token=special[1]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=special[0], unk_token=special[1], **options)


# -- classifiers ----------------------------------------------------------------------------------------------------


def sentences(count, labels=("neg", "pos"), seed=0):
    """Texts whose label, one of (bad, good), can be read off their words: (text, label)."""
    rng = random.Random(seed)
    for i in range(count):
        words = rng.choices(PLAIN, k=rng.randint(3, 12)) + rng.choices(GOOD if i % 2 else BAD, k=2)
        rng.shuffle(words)
        yield " ".join(words), labels[i % 2]


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_texts(path, rows=120, seed=0):
    """A CSV with columns text and label (1: good words, 0: bad ones)."""
    return write_csv(path, sentences(rows, (0, 1), seed))


def write_classifier(folder, cls="BertForSequenceClassification", layers=2, seed=0, **options):
    """A BERT of width 32 with four heads and a tokenizer for `sentences`."""
    import torch
    import transformers
    from tokenizers import processors

    words = [*GOOD, *BAD, *PLAIN]
    tokenizer = tokenizer_of(words, "[PAD]", "[UNK]", "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.2}
    getattr(transformers, cls)(transformers.BertConfig(**{**sizes, **options})).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- language models ------------------------------------------------------------------------------------------------


def write_model(folder, make=zoo.llama, shard="20KB", **options):
    """A random model in several shards, with a tokenizer of numbered words; returns the model."""
    model = make(**options)
    model.save_pretrained(folder, max_shard_size=shard)
    special = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
    tokenizer_of(NUMBERED, *special, eos_token="[EOS]", model_max_length=10**6).save_pretrained(folder)
    return model


def write_documents(path, documents=40, words=20, seed=0):
    """A document of numbered words on each line."""
    rng = random.Random(seed)
    path.write_text("\n".join(" ".join(rng.choices(NUMBERED, k=words)) for _ in range(documents)) + "\n")
    return path


# -- embeddings -----------------------------------------------------------------------------------------------------


def write_encoder(folder, pooling=("mean",), dense=None, **options):
    """A sentence-transformers folder around a tiny BERT. dense: the width of a linear layer after the pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    source = write_classifier(folder.with_name(folder.name + "-bare"), "BertModel", **options)
    parts = [modules.Transformer(str(source), max_seq_length=40), modules.Pooling(32, pooling_mode=tuple(pooling))]
    if dense is not None:
        parts.append(modules.Dense(32 * len(pooling), dense))
    SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu").save(str(folder))
    return folder


def pairs(count, seed=0):
    """Two sentences and how many of their words are the same, from 0 to 5: (sentence1, sentence2, score)."""
    rng = random.Random(seed)
    for i in range(count):
        first = rng.sample([*GOOD, *BAD, *PLAIN], 5)
        others = [word for word in [*GOOD, *BAD, *PLAIN] if word not in first]
        shared = i % 6
        second = first[:shared] + rng.sample(others, 5 - shared)
        rng.shuffle(second)
        yield " ".join(first), " ".join(second), shared
