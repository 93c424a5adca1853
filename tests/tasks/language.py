"""Tiny language models with a tokenizer of numbered words, as folders, and data for them."""

import csv
import random

from secateur.jobs.open_task import look, open_host, prepare
from secateur.tasks import Options, read_table
from tests import zoo
from tests.text_models import tokenizer_of

SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]")
WORDS = [f"w{i}" for i in range(zoo.VOCAB - len(SPECIAL))]


def write(folder, family, cls=None, **options):
    """A random model with its tokenizer; the folder."""
    zoo.build(family, cls, **options).save_pretrained(folder)
    names = {"eos_token": "[EOS]", "mask_token": "[MASK]", "model_max_length": 10**6}
    tokenizer_of(WORDS, *SPECIAL, **names).save_pretrained(folder)
    return folder


def counting(documents, words, seed=0):
    """Texts in which each word is the one after the word before it."""
    rng = random.Random(seed)
    for _ in range(documents):
        start = rng.randrange(len(WORDS))
        yield " ".join(WORDS[(start + i) % len(WORDS)] for i in range(words))


def write_lines(path, texts):
    path.write_text("\n".join(texts) + "\n")
    return path


def write_columns(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def opened(folder, data, **options):
    """Host, task and prepared data of a folder."""
    host, task = open_host(look(str(folder), None), Options(**options))
    material = prepare(task, read_table(data), None, calibration_samples=16, batch_size=4, seed=0)
    return host, task, material
