"""audio-classification: from a config and a folder of sounds to a pruned model."""

import numpy as np
import pytest
import torch
import transformers

from secateur import criteria
from secateur.budget import Uniform
from secateur.data.read import read_table
from secateur.data.table import as_table
from secateur.errors import DataError, ModelError
from secateur.jobs.open_task import look, open_host, open_to_train, prepare
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.select import parse_pattern
from secateur.tasks import Options
from secateur.tasks.audio_classification import AudioClassification
from secateur.tasks.find import find, headless, named, task_of_config
from tests import zoo
from tests.tasks.commands import refused, result
from tests.tasks.media_data import RATE, tone, write_sound_model, write_sounds, write_wav

AST = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3}
AST |= {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
WHISPER = {**zoo.both_sides(2, 4, 48), "d_model": 32, "num_mel_bins": 8, "max_source_positions": 50, "vocab_size": 50}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1, "num_labels": 3}
SHORT = np.zeros(900, np.float32)
"""Two frames."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sound_model(tmp_path_factory.mktemp("wav2vec2") / "model")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_sounds(tmp_path_factory.mktemp("sounds") / "data", rows=36)


@pytest.fixture(scope="module")
def task(folder):
    opened = look(str(folder), None)
    return opened.of(opened.model())


def test_the_task_is_found_from_the_config():
    config = transformers.Wav2Vec2Config(architectures=["Wav2Vec2ForSequenceClassification"])
    assert task_of_config(config) is named("AudioClassification") is AudioClassification
    assert headless(transformers.Wav2Vec2Config(architectures=["Wav2Vec2Model"])) is AudioClassification


def test_sounds_of_different_lengths_become_one_batch(task, sounds):
    table = read_table(sounds)
    examples = task.encode(table)
    lengths = [task.length(feature) for feature in examples.features]
    assert len(set(lengths)) > 20
    batch = task.collate(examples.features[:5])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_values": ((5, max(lengths[:5])), torch.float32),
        "attention_mask": ((5, max(lengths[:5])), torch.int64),
        "labels": ((5,), torch.int64),
    }
    assert batch["attention_mask"].sum(1).tolist() == lengths[:5]
    assert task.config.id2label == {0: "high", 1: "low", 2: "middle"}
    sizes = [int(b["attention_mask"].sum(1).min()) for b in task.batches(table, 6)]
    assert sizes == sorted(sizes, reverse=True)


def test_padding_changes_no_answer(task, sounds):
    batches = task.batches(read_table(sounds), 36)
    together = task.evaluate(task.model, batches)
    one_by_one = task.evaluate(task.model, task.batches(read_table(sounds), 1))
    assert together.predictions == one_by_one.predictions
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-4)


def test_a_sound_of_another_rate_is_resampled(task, tmp_path):
    samples = tone(1000.0, 0.4, np.random.default_rng(0))
    files = [write_wav(tmp_path / "a.wav", samples), write_wav(tmp_path / "b.wav", samples[::2], rate=RATE // 2)]
    first, second = task.encode(as_table({"audio": list(map(str, files))})).features
    assert task.length(first) == task.length(second) == len(samples)


@pytest.mark.parametrize("cls", ["ASTForAudioClassification", "WhisperForAudioClassification"])
def test_models_of_spectrograms(tmp_path, sounds, cls):
    if cls.startswith("AST"):
        extractor, sizes = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=32, sampling_rate=RATE), AST
    else:
        extractor, sizes = transformers.WhisperFeatureExtractor(8, RATE, chunk_length=1), WHISPER
    folder = write_sound_model(tmp_path / "model", cls, extractor=extractor, **sizes)
    host, task = open_host(look(str(folder), None), Options())
    data = prepare(task, read_table(sounds), None, calibration_samples=12, batch_size=6, seed=0)
    assert "attention_mask" not in data.test[0]
    heard = {"AST": 0.3, "Whi": 1.0}[cls[:3]]
    said = [note for note in task.notes if note.endswith(f"the model hears the first {heard:.1f} of each")]
    assert bool(said) is (heard < 0.5)
    outcome = run("x", host, [Stage(criteria.taylor, parse_pattern("ffn"), Uniform(0.5))], data, Tuning(),
                  tmp_path / "out")  # fmt: skip
    assert outcome.difference == outcome.reload_difference == 0.0


def test_several_labels_have_a_loss_that_the_model_lacks(tmp_path):
    folder = write_sound_model(tmp_path, problem_type="multi_label_classification")
    opened = look(str(folder), None)
    task = opened.of(opened.model(), Options(label_names=("cat", "dog", "bird")))
    batches = task.batches({"audio": [SHORT, SHORT], "label": [["cat", "bird"], "dog"]})
    batch = batches[0]
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 1, 0]]
    logits = task.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    by_hand = -(batch["labels"] * logits.sigmoid().log() + (1 - batch["labels"]) * (-logits).sigmoid().log()).mean()
    assert float(task.loss(task.model, batch)) == pytest.approx(float(by_hand), rel=1e-5)
    host, task = open_host(look(str(folder), None), Options(label_names=("cat", "dog", "bird")))
    data = prepare(task, as_table({"audio": [SHORT] * 12, "label": [["cat"], ["dog"]] * 6}), None,
                   calibration_samples=8, batch_size=4, seed=0)  # fmt: skip
    stage = Stage(criteria.taylor, parse_pattern("ffn"), Uniform(0.5))
    outcome = run("x", host, [stage], data, Tuning(epochs=1, distil=True))
    assert outcome.dense.metric == "micro F1"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"audio": ["none.wav"]}, "the data, row 0: no file none.wav"),
        ({"audio": [b"no sound"]}, "the data, row 0: the cell is no sound that can be read ("),
        ({"audio": [SHORT, SHORT[:100]]},
         "the data, row 1: a sound of 100 samples is too short for the model; remove it"),
        ({"audio": [SHORT], "label": ["loud"]}, "the data, row 0: label 'loud' is no class of the model; it knows "),
        ({"audio": [SHORT], "label": [""]}, "the data, row 0: column 'label' is empty; fill it or remove the row"),
        ({"sound": ["a.wav"]}, "the data has no column audio or path or file or file_name; name the audio with "
         "--audio-column, one of sound"),
    ],
)  # fmt: skip
def test_bad_rows(folder, columns, sentence):
    opened = look(str(folder), None)
    task = opened.of(opened.model(), Options(label_names=("high", "low", "middle")))
    with pytest.raises(DataError) as caught:
        task.batches(columns)
    assert str(caught.value).startswith(sentence)


def test_a_folder_without_a_feature_extractor(tmp_path, task):
    folder = write_sound_model(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        AudioClassification.load_processor(folder)
    assert str(caught.value) == (
        f"{folder} holds no feature extractor (preprocessor_config.json); save the one that the model was trained with "
        "into it"
    )
    other = find(task.model, transformers.WhisperFeatureExtractor(8, RATE, chunk_length=1))
    with pytest.raises(ModelError, match="the model reads input_values, the feature extractor gives input_features"):
        other.batches({"audio": [SHORT]})


# -- scores and pruning -----------------------------------------------------------------------------------------------


def test_scores_by_hand(task, sounds):
    table = read_table(sounds)
    batch = task.collate(task.encode(table).features)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = task.model(**batch).logits
    got = task.evaluate(task.model, task.batches(table, 8))
    assert got.values["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert got.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


def test_without_labels_the_dense_model_is_the_measure(task, sounds):
    batches = task.batches({"audio": read_table(sounds).columns["audio"]}, 8)
    same = task.evaluate(task.model, batches, against=task.model)
    assert same.is_against_dense
    assert same.values == {"accuracy": 1.0, "macro F1": 1.0}
    assert same.flips == 0.0
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    batch = batches[0]
    labels = task.own_labels(task.model(**batch), batch)
    assert torch.isfinite(task.loss(task.model, {**batch, **labels}))


def test_padding_has_no_part_in_activations(folder, sounds):
    host, task = open_host(look(str(folder), None), Options())
    table = read_table(sounds)
    padded = host.collect(["act_sq"], task.batches(table, 36))
    single = host.collect(["act_sq"], task.batches(table, 1))
    name = "wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"
    assert padded.counts["act_sq"][name] == single.counts["act_sq"][name]
    assert np.allclose(padded.mean("act_sq", name), single.mean("act_sq", name), rtol=1e-3)


def test_prune_without_labels_and_reload(folder, sounds, tmp_path):
    host, task = open_host(look(str(folder), None), Options())
    table = as_table({"audio": read_table(sounds).columns["audio"]})
    data = prepare(task, table, None, calibration_samples=12, batch_size=6, seed=0)
    stage = Stage(criteria.taylor, parse_pattern("head,ffn"), Uniform(0.5))
    outcome = run("small", host, [stage], data, Tuning(epochs=1, distil=True), tmp_path / "small")
    assert outcome.difference == outcome.reload_difference == 0.0
    assert outcome.dense.is_against_dense
    again = look(str(tmp_path / "small"), None)
    small = again.of(again.model())
    assert small.processor.to_dict() == task.processor.to_dict()
    assert small.evaluate(small.model, small.batches(table), against=small.model).flips == 0.0


def test_an_encoder_without_a_head_gets_one_for_the_labels(tmp_path, sounds):
    folder = write_sound_model(tmp_path / "base", "Wav2Vec2Model")
    task = open_to_train(str(folder), None, read_table(sounds), Options())
    assert task.name == "audio-classification"
    assert task.config.id2label == {0: "high", 1: "low", 2: "middle"}


def test_the_command_line(folder, sounds, tmp_path, capsys):
    dense, small = tmp_path / "dense", tmp_path / "small"
    training = ("--epochs", "12", "--learning-rate", "3e-3", "--batch-size", "6")
    trained = result(capsys, "train", folder, "--data", sounds, "--output", dense, *training)
    assert trained["task"] == "audio-classification"
    scored = result(capsys, "eval", dense, "--data", sounds)
    assert scored["values"]["accuracy"] > 0.9
    assert scored["loss"] < trained["loss"]
    rows = [f"{file},{file.parent.name}" for file in sorted(sounds.rglob("*.wav"))]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["recording,pitch", *rows]))
    given = ("--data", data, "--audio-column", "recording", "--label-column", "pitch")
    options = ("--criterion", "magnitude", "--pattern", "ffn", "--sparsity", "0.5")
    pruned = result(capsys, "prune", dense, *given, *options, "--output", small)
    assert pruned["difference"] == 0.0
    assert result(capsys, "eval", small, *given, "--against", dense)["rows"] == len(rows)
    data.write_text("\n".join(["recording,pitch", *rows, "none.wav,high"]))
    sentence = refused(capsys, "prune", dense, *given, *options, "--output", tmp_path / "not")
    assert sentence == f"{data}, line {len(rows) + 2}: no file {tmp_path / 'none.wav'}"
    assert not (tmp_path / "not").exists()
