"""Python code that comes with a model neither runs nor makes transformers ask on the terminal whether it may."""

import builtins
import sys

import pytest
import transformers

import secateur
from secateur.cli import main
from secateur.data.table import as_table
from secateur.errors import ModelError
from secateur.jobs.open_task import open_to_train
from secateur.tasks import Options
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.files import completeness, saving
from secateur.torch.open import load_model, read_config
from tests import zoo
from tests.text_models import write_classifier, write_model, write_texts
from tests.torch.files.shrunk import edit

SENTENCE = r"works only with Python code that comes with it, which was not run; .* pass trust_remote_code=True"
CODE = """
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
open({mark!r}, "w").close()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizer):
    pass
"""
AUTO = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoTokenizer": ["own.OwnTokenizer", None]}


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that is there once code of a folder has run; a question on the terminal fails the test."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(builtins, "input", lambda text="": pytest.fail(f"asked: {text}"))
    return tmp_path / "it-ran"


@pytest.fixture
def own(tmp_path, mark):
    """A classifier whose config names a class of the folder's own."""
    folder = write_classifier(tmp_path / "own")
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    edit(folder / "config.json", lambda c: c.update(model_type="own", auto_map=AUTO, architectures=["OwnModel"]))
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="OwnTokenizer", auto_map=AUTO))
    return folder


@pytest.mark.parametrize("stated", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
def test_a_model_of_own_code_is_one_sentence(own, mark, stated):
    with pytest.raises(ModelError, match=SENTENCE):
        secateur.open(own, **stated)
    with pytest.raises(ModelError, match="names no model class of transformers"):
        saving.load(own, **stated)
    edit(own / "config.json", lambda c: c.update(architectures=["BertModel"]))
    with pytest.raises(ModelError, match=SENTENCE):
        saving.load(own, **stated)
    with pytest.raises(ModelError, match=SENTENCE):
        read_config(own)
    with pytest.raises(ModelError, match=SENTENCE):
        open_to_train(str(own), None, as_table({"text": ["a", "b"], "label": ["x", "y"]}), Options())
    assert not mark.exists()


def test_a_tokenizer_of_own_code_is_one_sentence(own, mark):
    with pytest.raises(ModelError, match=SENTENCE):
        load_tokenizer(own)
    assert not mark.exists()


def test_a_user_who_says_so_runs_it(own, mark):
    assert type(load_model(own, trust_remote_code=True)).__name__ == "OwnModel"
    assert mark.exists()
    assert type(load_tokenizer(own, trust_remote_code=True)).__name__ == "OwnTokenizer"


def test_a_class_of_transformers_is_taken_before_own_code(tmp_path, mark):
    folder = write_classifier(tmp_path / "model")
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.X"}))
    assert type(load_model(folder)).__module__.startswith("transformers.")


def test_sizes_are_checked_without_own_code(mark):
    """A class that transformers does not have for a task, which the config says is in the folder."""
    config = zoo.bert().config
    config.auto_map = {"AutoModelForImageClassification": "own.OwnModel"}
    factory = transformers.AutoModelForImageClassification
    completeness.check_config("x", factory, config, {})
    with pytest.raises(ValueError, match="contains custom code"):
        completeness.from_config(factory, config)


@pytest.mark.parametrize(
    "command",
    [
        "prune {model} --data {data} --output {out} --sparsity 0.5",
        "train {model} --data {data} --output {out}",
        "eval {model} --data {data}",
        "run {model} text",
        "export {model} --to onnx --output {out}",
        "inspect {model}",
    ],
)
def test_commands_say_it_in_one_line(own, mark, tmp_path, capsys, command):
    data = write_texts(tmp_path / "rows.csv", 40)
    with pytest.raises(SystemExit) as caught:
        main(command.format(model=own, data=data, out=tmp_path / "out").split())
    assert caught.value.code == 2
    assert "works only with Python code that comes with it" in " ".join(capsys.readouterr().err.split())
    assert not mark.exists()


# -- hub ids ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one file", "shards"])
def hub(request, tmp_path, monkeypatch):
    """A tiny Llama in a cache of the hub, which is out of reach; files are links, as there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "blobs").mkdir()
    write_model(snapshot, shard="1GB" if request.param == "one file" else "20KB")
    weights = list(snapshot.glob("*.safetensors"))
    assert (len(weights) == 1) == (request.param == "one file")
    for file in weights:
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(cache / "blobs" / file.name)
    return snapshot


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"num_hidden_layers": 10**9}, "claims num_hidden_layers 1000000000, but its files hold"),
        ({"num_labels": 10**9}, "claims num_labels 1000000000, but its files hold"),
        ({"intermediate_size": 10**8}, r"describes a LlamaForCausalLM of \d+ elements, but its files hold"),
    ],
)
def test_what_a_config_of_a_hub_id_claims_is_bounded(hub, tmp_path, monkeypatch, claim, said):
    assert load_model("org/name", cache_dir=tmp_path).config.num_hidden_layers > 1
    edit(hub / "config.json", lambda c: c.update(claim))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(ModelError, match=said):
        load_model("org/name", cache_dir=tmp_path)


def test_a_hub_id_with_damaged_weights_is_one_sentence(hub, tmp_path):
    file = next(hub.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{file.name} .*save or copy it again"):
        load_model("org/name", cache_dir=tmp_path)
