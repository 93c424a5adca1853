"""The snippets of docs/keras.md run, on a tiny Transformer."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from secateur.cli import main
from tests.keras import models

keras = models.keras
PAGE = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the page exports to LiteRT"),
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.integers(1, models.VOCAB, (32, models.LENGTH)).astype("int32")
    y = rng.integers(0, models.CLASSES, 32)
    dense = models.transformer(blocks=1)
    model = keras.Sequential([dense, keras.layers.Softmax()], name="classifier")
    model.compile("adam", "sparse_categorical_crossentropy")
    models.compiled(dense).save("model.keras")
    np.savez("data.npz", x=x, y=y)
    return {"x": x, "y": y, "model": model}


def test_python(names):
    exec(compile("\n".join(blocks("python")), "keras.md", "exec"), names)
    assert names["small"].count_params() < names["model"].count_params()
    assert Path("small.tflite").stat().st_size > 1000


def test_commands(names, capsys):
    for line in "\n".join(blocks("sh")).splitlines():
        with pytest.raises(SystemExit) as exit:
            main(shlex.split(line)[1:])
        assert exit.value.code == 0, capsys.readouterr().err
