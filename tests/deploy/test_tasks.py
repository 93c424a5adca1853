"""Artefacts of models of every kind answer as PyTorch does, on real inputs: ONNX Runtime and OpenVINO."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors
from torch import nn

import secateur
from secateur.data.table import Table
from secateur.deploy import target
from secateur.deploy.jobs import bench, generation, material, parity
from secateur.deploy.jobs import export as exporting
from secateur.deploy.jobs.export import export
from secateur.deploy.targets.inputs import fitted, inputs_of, ports_of
from secateur.errors import DataError, ModelError
from secateur.tasks import Options, find
from tests import zoo

from ..text_models import GOOD, PLAIN, tokenizer_of, write_classifier, write_model

pytestmark = pytest.mark.slow
LACKING = {
    "onnx": [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None],
    "openvino": [p for p in ("openvino",) if importlib.util.find_spec(p) is None],
}
BOTH = [pytest.param(n, marks=pytest.mark.skipif(bool(LACKING[n]), reason="not installed")) for n in LACKING]
ONNX = pytest.mark.skipif(bool(LACKING["onnx"]), reason="not installed")
RATE = 16000
WAVES = {"conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_conv_pos_embeddings": 8}
WAVES |= {"num_conv_pos_embedding_groups": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WAVES |= {"intermediate_size": 48, "vocab_size": 20}
FRAMES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
FRAMES |= {"max_length": 40, "num_mel_bins": 16, "patch_size": 8, "num_labels": 4}


def check(model, made, batch):
    """The program of an artefact gives the model's outputs on a batch."""
    program = target.load(made.folder)
    with torch.no_grad():
        expected = {k: v.numpy() for k, v in model.eval()(**batch).items() if isinstance(v, torch.Tensor)}
    got = program({name: value.numpy() for name, value in batch.items()})
    assert expected.keys() <= got.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert np.abs(got[name] - value).max() < 1e-4 * max(1.0, np.abs(value).max())


def tokens(count, length, seed=0):
    ids = torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 20).long().sort(-1).values}


TEXT = {"token-classification": "BertForTokenClassification", "question-answering": "BertForQuestionAnswering"}
TEXT["feature-extraction"] = "BertModel"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("task", TEXT)
def test_texts(task, name, tmp_path):
    model = zoo.build("bert", TEXT[task], num_hidden_layers=1)
    labels = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 2, 4])}
    batches = [{**tokens(3, 9), **(labels if task == "question-answering" else {})}, tokens(2, 14, seed=1)]
    made = export(model, name, tmp_path / "out", data=batches)
    assert made.parity.relative_error < 1e-4
    assert made.parity.shapes == ["3 x 9", "2 x 14"]
    assert made.parity.agreement == (None if task == "feature-extraction" else 1.0)
    check(model, made, tokens(4, 6, seed=2))


@pytest.mark.parametrize("name", BOTH)
def test_images_of_the_size_of_the_data(name, tmp_path):
    model = zoo.vit(num_hidden_layers=1)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = export(model, name, tmp_path / "out", data=[(images, torch.tensor([0, 1, 2])), images[:1]])
    assert made.parity.agreement == 1.0
    assert made.parity.examples == 4
    check(model, made, {"pixel_values": images[:2]})


@pytest.mark.parametrize("name", BOTH)
def test_speech_of_any_length(name, tmp_path):
    model = zoo.random_model("Wav2Vec2ForCTC", {**WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"})
    sounds = [torch.randn(2, 900), torch.randn(1, 1500)]
    batches = [{"input_values": s, "attention_mask": torch.ones(s.shape, dtype=torch.long)} for s in sounds]
    batches[0]["attention_mask"][1, 600:] = 0
    made = export(model, name, tmp_path / "out", data=batches)
    assert made.parity.shapes == ["2 x 900", "1 x 1500"]
    assert made.parity.agreement == 1.0
    ports = json.loads((made.folder / "artefact.json").read_text())["graphs"]["model"]["inputs"]
    assert [(port["name"], port["shape"], port["usual"]) for port in ports] == [
        ("input_values", ["batch", "samples"], 900),
        ("attention_mask", ["batch", "samples"], 900),
    ]
    check(model, made, {k: v[:, :800] for k, v in batches[0].items()})


@pytest.mark.parametrize("name", BOTH)
def test_sounds_as_spectrograms(name, tmp_path):
    model = zoo.random_model("ASTForAudioClassification", FRAMES)
    made = export(model, name, tmp_path / "out", data=[{"input_values": torch.randn(3, 40, 16)}])
    assert made.parity.agreement == 1.0
    check(model, made, {"input_values": torch.randn(2, 40, 16)})


@pytest.mark.parametrize("name", BOTH)
def test_rows_of_pairs(name, tmp_path):
    folder = write_classifier(tmp_path / "model", layers=1)
    words = tokenizer_of([*GOOD, *PLAIN], "[PAD]", "[UNK]", "[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]",
                         model_input_names=["input_ids", "token_type_ids", "attention_mask"])  # fmt: skip
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    words.save_pretrained(folder)
    first = ["the film was good", "a plot", "great"] * 4
    second = ["the plot and the actor", "fine", "a lovely scene"] * 4
    table = Table({"premise": first, "hypothesis": second, "label": ["not a class"] * 12}, "pairs")
    made = export(folder, name, tmp_path / "out", data=table)
    assert made.parity.examples == 12
    assert made.parity.agreement == 1.0
    assert {shape.split(" x ")[0] for shape in made.parity.shapes} == {"1", "3", "8"}
    encoded = words(first[:3], second[:3], return_tensors="pt", padding=True)
    assert encoded["token_type_ids"].any()
    check(secateur.load(folder), made, dict(encoded))


# -- what needs no export -------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A model that no config describes."""

    def forward(self, positions, values):
        return values * positions[:, :1]


def test_an_example_is_taken_from_the_data():
    batch = {"positions": torch.tensor([[3, 1, 2], [2, 2, 2]]), "values": torch.randn(2, 4)}
    given = material.read(Fixed(), iter([batch, {k: v[:1] for k, v in batch.items()}]), None)
    ports = {port.name: port for port in ports_of(Fixed(), given.first)}
    assert (ports["positions"].fill, ports["positions"].high) == ("ids", 4)
    assert ports["values"].shape == ("batch", 4)
    feeds = list(parity.batches(Fixed(), given, target.Target("onnx", (), "any", None), list(ports.values())))
    assert [len(feed["values"]) for feed in feeds] == [2, 1]


def test_rows_for_one_shape_are_padded_and_filled_up(classifier):
    rows = Table({"text": ["the film was good", "a film", "the plot the plot the plot"], "label": ["x"] * 3}, "rows")
    kind = target.Target("litert", (), "fixed", None)
    model = secateur.load(classifier)
    ports = fitted(kind, model, ports_of(model, inputs_of(model)), 2, 6)
    encoded = material.read(model, rows, classifier, length=6)
    feeds = list(parity.batches(model, encoded, kind, ports))
    assert [feed["input_ids"].shape for feed in feeds] == [(2, 6), (2, 6)]
    assert torch.equal(feeds[1]["input_ids"][0], feeds[1]["input_ids"][1])
    assert all(feed.keys() == {"input_ids", "attention_mask"} for feed in feeds)
    ready = find(model, encoded.task.processor).batches({"text": ["a film", "the film was good"]})
    (filled,) = parity.batches(model, material.read(model, ready, None), kind, ports)
    assert filled["input_ids"].shape == (2, 6)


def test_prompts_of_a_table_are_padded_on_the_left(tmp_path):
    model = write_model(tmp_path / "model")
    table = Table({"text": ["w1 w2 w3 w4", "w5 w6", "w7"]}, "rows")
    found = material.read(model, table, tmp_path / "model", generate=True)
    chosen = generation.prompts_of(model, found, zoo.inputs(model))
    assert chosen["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert chosen["input_ids"][1, 2:].tolist() == [9, 10]
    assert chosen.keys() == {"input_ids", "attention_mask"}
    assert found.tokenizer.padding_side == "right"
    two = Table({"a": ["x"], "b": ["y"]}, "rows")
    with pytest.raises(DataError, match="--text-column names 2 columns; a model goes on with one text"):
        material.read(model, two, tmp_path / "model", generate=True, options=Options(columns={"text": "a,b"}))


def test_sounds_for_one_shape_are_cut_and_filled_up():
    model = zoo.random_model("Wav2Vec2ForCTC", WAVES)
    kind = target.Target("litert", (), "fixed", None)
    given = material.read(model, [torch.ones(2, 900), torch.ones(2, 500)], None)
    ports = fitted(kind, model, ports_of(model, given.first), 2, 700)
    assert [port.shape for port in ports] == [(2, 700)]
    cut, filled = parity.batches(model, given, kind, ports)
    assert float(cut["input_values"].sum()) == 1400
    assert filled["input_values"].sum(1).tolist() == [500, 500]
    assert fitted(kind, model, ports_of(model, given.first), None, None)[0].shape == (8, 900)


def test_a_second_of_sound_at_the_rate_of_the_extractor(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=2000, return_attention_mask=True)
    extractor.save_pretrained(tmp_path)
    made_up = inputs_of(zoo.random_model("Wav2Vec2ForCTC", WAVES), None, tmp_path)
    assert made_up["input_values"].shape == made_up["attention_mask"].shape == (2, 2000)


def test_a_task_by_its_name_or_that_of_its_class(classifier):
    loaded = [exporting.load_for(classifier, name) for name in (None, "text-classification", "SequenceClassification")]
    assert {type(model) for model in loaded} == {transformers.BertForSequenceClassification}
    with pytest.raises(ModelError, match="transformers has no AutoModelForpoetry"):
        exporting.load_for(classifier, "poetry")


@ONNX
def test_bench_of_images_and_sounds(tmp_path):
    zoo.vit(num_hidden_layers=1).save_pretrained(tmp_path / "eye")
    zoo.random_model("Wav2Vec2ForCTC", WAVES).save_pretrained(tmp_path / "ear")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=2000).save_pretrained(tmp_path / "ear")
    said = []
    for name, runtime in (("eye", "secateur"), ("ear", "onnx")):
        found = bench.bench([tmp_path / name], [runtime], batch=[2], length=[9, 5], turns=1, say=said.append)
        (row,) = found.as_json()["rows"]
        assert (row["error"], row["batch"], row["length"]) == ("", 2, None)
    assert "onnx: batch 2" in said
