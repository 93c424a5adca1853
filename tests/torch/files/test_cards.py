"""The card of a saved folder: what it says of how to open the model is run."""

import re

import pytest
import torch

import secateur
from secateur.card.front_matter import read_front_matter
from secateur.card.write import NAME
from secateur.record import write_record
from secateur.schemas.record import Record
from secateur.torch.files import saving
from secateur.torch.files.describe import hub_id_of
from tests import zoo
from tests.text_models import write_classifier
from tests.torch.files.shrunk import shrunk


def opened(folder, monkeypatch, **names):
    """What the Python of a card makes, run in its folder."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / NAME).read_text(), re.S)
    monkeypatch.chdir(folder)
    exec(snippet, names)
    return snippet, names


def test_a_shrunk_classifier_is_opened_as_its_card_says(tmp_path, monkeypatch):
    source = write_classifier(tmp_path / "dense")
    (source / NAME).write_text("---\nlicense: mit\nbase_model: acme/big\n---\nA private story.\n")
    host = secateur.open(str(source))
    plan = secateur.Plan({"L0.ffn": list(range(5))}, provenance={"criterion": "taylor", "pattern": "ffn"})
    host.resize(plan)
    host.save(tmp_path / "small", plan.check(secateur.open(str(source)).layout))
    front = read_front_matter(tmp_path / "small" / NAME)
    assert (front["license"], front["base_model"]) == ("mit", "acme/big")
    text = (tmp_path / "small" / NAME).read_text()
    assert "private" not in text
    assert "5 of 64" in text
    assert "`taylor`" in text
    assert saving.check_unchanged(tmp_path / "small") > 0
    for record in (None, Record(title="small", task="text-classification")):
        if record is not None:
            write_record(record, tmp_path / "small")
        snippet, made = opened(tmp_path / "small", monkeypatch)
        assert snippet.startswith("import secateur\nfrom transformers import AutoModelForSequenceClassification, Auto")
        encoded = made["tokenizer"](["good film"], return_tensors="pt")
        host.model.eval()
        torch.testing.assert_close(made["model"](**encoded).logits, host.model(**encoded).logits)
    assert read_front_matter(tmp_path / "small" / NAME)["license"] == "mit"
    (tmp_path / "small" / NAME).write_text("mine")
    assert saving.check_unchanged(tmp_path / "small") > 0


def test_a_stock_checkpoint_is_opened_without_secateur(tmp_path, monkeypatch):
    saving.save(zoo.build("gpt2"), tmp_path / "a")
    snippet, made = opened(tmp_path / "a", monkeypatch)
    assert "secateur" not in snippet
    assert type(made["model"]).__name__ == zoo.build("gpt2").__class__.__name__
    assert read_front_matter(tmp_path / "a" / NAME)["tags"] == ["secateur"]


def test_a_uniformly_shrunk_model_is_said_to_be_pruned(tmp_path):
    model = shrunk("bert", {f"L{i}.ffn": range(8) for i in range(3)})
    assert saving.save(model, tmp_path / "a").stock
    assert read_front_matter(tmp_path / "a" / NAME)["tags"] == ["secateur", "pruning"]


def test_a_module_is_opened_with_its_class(tmp_path, monkeypatch):
    saving.save(zoo.Sentence(), tmp_path / "a")
    _, made = opened(tmp_path / "a", monkeypatch, Model=zoo.Sentence)
    assert isinstance(made["model"], zoo.Sentence)
    assert "library_name" not in read_front_matter(tmp_path / "a" / NAME)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hub/models--acme--big/snapshots/0123", "acme/big"),
        ("hub/models--acme--big--er/snapshots/0123", None),
        ("models/big", None),
    ],
)
def test_the_hub_id_of_a_folder_in_the_cache(tmp_path, folder, name):
    assert hub_id_of(tmp_path / folder) == name
