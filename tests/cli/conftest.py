"""A tiny classifier with its tokenizer and its data on disk, and the real entry point called in-process."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest

from secateur.cli import main

GOOD = ("good", "fine", "great", "lovely", "bright")
BAD = ("bad", "poor", "awful", "dull", "grim")
PLAIN = ("the", "film", "was", "a", "plot", "with", "some", "of", "it", "in")


def sentences(count, seed=0):
    """Texts whose label can be read off their words: (text, label)."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = ("neg", "pos")[i % 2]
        words = [*rng.choices(PLAIN, k=rng.randint(2, 8)), *rng.choices(GOOD if label == "pos" else BAD, k=2)]
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A random BERT without a head, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", sentences(240))


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, encoder, data):
    """The encoder trained by the command line."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    arguments = ["train", str(encoder), "--data", str(data), "--output", str(folder), "--epochs", "6"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--learning-rate", "3e-3", "--max-length", "16"])
    assert caught.value.code == 0
    return folder


@pytest.fixture
def copy(classifier, tmp_path):
    """A copy of the classifier that a test may damage."""
    return shutil.copytree(classifier, tmp_path / "model")


@pytest.fixture
def call(capsys):
    """Run the command line: code, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def result(call):
    """Run a command with --json; what it printed, parsed."""

    def run(*arguments):
        done = call(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


@pytest.fixture
def place(tmp_path):
    """An empty folder in which the output is to appear."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def refused(call, place):
    """Run a command that has to fail: exit code 2, one sentence on standard error, nothing written in `place`."""

    def run(*arguments):
        before = sorted(place.rglob("*"))
        done = call(*arguments)
        assert done.code == 2, (done.code, done.out, done.err)
        assert "Traceback" not in done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.err
        assert done.err.rstrip().splitlines()[-1] == errors[0], done.err
        assert sorted(place.rglob("*")) == before
        return errors[0].removeprefix("error: ")

    return run
