"""A tiny classifier that learned to tell good words from bad ones, with batches of sentences for it."""

import pytest
import torch
import transformers

import secateur

from ..text_models import sentences, write_classifier


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A host of a BERT of 4 blocks, trained for a few steps on sentences, and its tokenizer."""
    folder = write_classifier(tmp_path_factory.mktemp("trained") / "model", layers=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.hidden_dropout_prob = 0.0
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = list(sentences(480, (0, 1), seed=1))
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        labels = torch.tensor([label for _, label in part])
        loss = model(**encode(tokenizer, [text for text, _ in part]), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return secateur.open(model, example=encode(tokenizer, [text for text, _ in rows[:2]])), tokenizer


@pytest.fixture(scope="session")
def batches(trained):
    """A function: how many rows, their seed, rows in a batch -> batches of sentences."""
    tokenizer = trained[1]

    def make(rows, seed=7, size=16):
        texts = [text for text, _ in sentences(rows, seed=seed)]
        return [encode(tokenizer, texts[start : start + size]) for start in range(0, rows, size)]

    return make


def encode(tokenizer, texts):
    return dict(tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"))
