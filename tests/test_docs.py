"""Every snippet of the README and the guides runs: Python in order in one namespace, `secateur` lines in-process."""

import re
import shlex
from pathlib import Path

import pytest

from .text_models import write_classifier, write_texts

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[1]
KERAS = "docs/keras.md"  # runs in a process of its own: see tests/keras/test_docs.py
PAGES = ["README.md", "README.zh.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
PAGES.remove(KERAS)
FAST = ("README.md",)
START = "docs/index.md"  # its Python opens what its commands have written
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    return [code for language, code in FENCE.findall((ROOT / page).read_text()) if language in languages]


def pages_with(language, without=None):
    found = [page for page in PAGES if page != without and blocks(page, language)]
    return [pytest.param(page, id=page, marks=() if page in FAST else pytest.mark.slow) for page in found]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classifier(tmp_path / "classifier")
    write_texts(tmp_path / "reviews.csv")
    write_texts(tmp_path / "test.csv", seed=1)
    return tmp_path


@pytest.fixture(autouse=True)
def language(request, here):
    """A language model, an encoder, text and the recipes that a page shows, for the pages that speak of them."""
    page = request.node.callspec.params.get("page")
    if page and "./minilm" in (ROOT / page).read_text():
        from .text_models import sentences, write_csv, write_encoder

        write_encoder(here / "minilm")
        write_csv(here / "texts.csv", [[text] for text, _ in sentences(60)], ["text"])
    if page and "vision_model" in (ROOT / page).read_text():
        from .tasks.media_data import write_ctc_model, write_image_model

        write_image_model(here / "vision")
        write_ctc_model(here / "speech")
    if page and "./mixture" in (ROOT / page).read_text():
        from .text_models import write_model
        from .zoo import build

        write_model(here / "mixture", make=build, name="mixtral")
    if page and "./llm" in (ROOT / page).read_text():
        from .text_models import write_documents, write_model

        write_model(here / "llm")
        write_documents(here / "news.txt")
        for code in blocks(page, "yaml"):
            name = code.split("\n", 1)[0].removeprefix("# ")
            (here / name).write_text(code)


def namespace(folder):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(4, 20, (4, 9)),
            "attention_mask": torch.ones(4, 9, dtype=torch.long),
            "labels": torch.randint(2, (4,)),
        }
        for _ in range(3)
    ]

    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    model = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    names = {"model": model, "batch": batches[0], "batches": batches, "train": train}
    if (folder / "minilm").exists():
        names |= {
            "encoder": AutoModel.from_pretrained(folder / "minilm").eval(),
            "tokenizer": AutoTokenizer.from_pretrained(folder / "minilm"),
        }
    if (folder / "vision").exists():
        names |= _media(folder)
    return names


def _media(folder):
    """A model of images and one of speech, with their processors, a picture and a sound."""
    import numpy as np
    from PIL import Image
    from transformers import AutoModelForCTC, AutoModelForImageClassification, AutoProcessor

    from secateur.tasks.image_classification import ImageClassification

    return {
        "vision_model": AutoModelForImageClassification.from_pretrained(folder / "vision").eval(),
        "image_processor": ImageClassification.load_processor(folder / "vision"),
        "picture": Image.new("RGB", (20, 20), "red"),
        "speech_model": AutoModelForCTC.from_pretrained(folder / "speech").eval(),
        "speech_processor": AutoProcessor.from_pretrained(folder / "speech"),
        "samples": np.sin(np.arange(8000) / 5).astype(np.float32),
    }


def run_python(page, folder):
    names = namespace(folder)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
    assert "secateur" in names


@pytest.mark.parametrize("page", pages_with("python", without=START))
def test_python_snippets(page, here):
    run_python(page, here)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh"))
def test_command_snippets(page, here, capsys):
    from secateur.cli import main

    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.strip()]
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "secateur", line
        with pytest.raises(SystemExit) as exit:
            main(words[1:])
        assert exit.value.code == 0, (line, capsys.readouterr().err)
    if page == START:
        run_python(page, here)
