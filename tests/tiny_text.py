"""A tiny random text classifier with a tokenizer, and labelled texts, as a folder and a CSV file."""

import csv
import random

GOOD = ["good", "great", "fine", "lovely"]
BAD = ["bad", "awful", "dull", "poor"]
PLAIN = ["film", "plot", "actor", "scene", "the", "a", "is", "was", "and", "with"]
WORDS = [*GOOD, *BAD, *PLAIN]


def write_texts(path, rows=120, seed=0):
    """A CSV with columns text and label (1: good words, 0: bad ones)."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            words = rng.choices(PLAIN, k=rng.randint(3, 12)) + rng.choices(GOOD if i % 2 else BAD, k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), i % 2])
    return path


def write_classifier(folder, layers=2, seed=0):
    """A BERT of width 32 with four heads, saved with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
