"""A tiny classifier with its tokenizer and its data on disk, and the real entry point called in-process."""

import json
import shutil
from types import SimpleNamespace

import pytest

from secateur.cli import main
from tests.text_models import sentences, write_classifier, write_csv


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A random BERT without a head, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    return write_classifier(folder, "BertModel", max_position_embeddings=32, initializer_range=0.02)


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
    """Run a command that has to fail: exit code 2 (130 after Ctrl-C), one sentence on standard error, nothing written
    in `place`."""

    def run(*arguments, code=2):
        before = sorted(place.rglob("*"))
        done = call(*arguments)
        assert done.code == code, (done.code, done.out, done.err)
        assert "Traceback" not in done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.err
        assert done.err.rstrip().splitlines()[-1] == errors[0], done.err
        assert sorted(place.rglob("*")) == before
        return errors[0].removeprefix("error: ")

    return run
