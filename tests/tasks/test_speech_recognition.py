"""automatic-speech-recognition: models with CTC and encoder-decoders, from a table of sounds to a pruned model."""

import numpy as np
import pytest
import torch
import transformers

from secateur import criteria
from secateur.budget import Uniform
from secateur.data.read import read_table
from secateur.data.table import as_table
from secateur.errors import DataError, ModelError
from secateur.jobs.open_task import look, open_host, prepare
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.pruning import prune
from secateur.select import parse_pattern
from secateur.tasks import Options
from secateur.tasks.automatic_speech_recognition import SpeechRecognition, collapsed, joins
from secateur.tasks.find import auto_class_for, find, named, task_of_config
from secateur.torch.base.batches import IGNORED
from secateur.torch.host import TorchHost
from secateur.training.fine_tune import fine_tune
from tests.tasks.commands import refused, result
from tests.tasks.media_data import letter_tokenizer, write_ctc_model, write_speech, write_whisper

OPTIONS = Options(new_tokens=8)
KINDS = {"ctc": write_ctc_model, "whisper": write_whisper}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name) / "model") for name, write in KINDS.items()}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"), rows=24)


def task_of(folder):
    opened = look(str(folder), None)
    return opened.of(opened.model(), OPTIONS)


@pytest.fixture(scope="module", params=list(KINDS))
def task(request, folders):
    return task_of(folders[request.param])


def only_sounds(speech):
    table = read_table(speech)
    return as_table({"audio": [str(speech.parent / name) for name in table.columns["file"]]})


def test_the_task_is_found_from_the_config():
    ctc = transformers.Wav2Vec2Config(architectures=["Wav2Vec2ForCTC"])
    whisper = transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"])
    assert task_of_config(ctc) is task_of_config(whisper) is named("automatic-speech-recognition") is SpeechRecognition
    assert auto_class_for(SpeechRecognition, ctc) == "CTC"
    assert auto_class_for(SpeechRecognition, whisper) == "SpeechSeq2Seq"


def test_sounds_and_targets_become_a_batch(task, speech):
    table = read_table(speech)
    examples = task.encode(table)
    assert examples.references == list(table.columns["text"])
    assert task.notes == ["the column file is taken as audio (--audio-column names another)"]
    batch = task.collate(examples.features[:3])
    lengths = [len(text) + task.writes for text in examples.references[:3]]
    assert batch["labels"].shape == (3, max(lengths))
    assert (batch["labels"] != IGNORED).sum(1).tolist() == lengths
    if task.writes:
        assert set(batch) == {"input_features", "labels"}
        assert batch["labels"][0, lengths[0] - 1] == 0  # the end, and no start
    else:
        assert set(batch) == {"input_values", "attention_mask", "labels"}


def test_a_target_for_a_decoder_ends_once_and_does_not_start(folders):
    task = task_of(folders["whisper"])
    assert task._tokens("ab c") == [4, 5, 3, 6, 0]
    task.processor.tokenizer.backend_tokenizer.post_processor = None
    assert task._tokens("ab c") == [4, 5, 3, 6, 0]


# -- what frames spell ------------------------------------------------------------------------------------------------


def test_frames_are_joined_as_the_tokenizer_of_the_model_joins_them(folders):
    assert collapsed([0, 5, 5, 0, 5, 6, 6, 0, 0], 0) == [5, 5, 6]
    assert collapsed([0, 0], 0) == []
    task = task_of(folders["ctc"])
    plain = letter_tokenizer()  # which joins nothing
    assert joins(task.processor.tokenizer, 0)
    assert not joins(plain, 0)
    frames = [0, 5, 5, 0, 5, 4, 4, 7, 0]
    assert task.predict([np.array(frames, float)], []) == "aa c"
    other = find(task.model, type(task.processor)(task.processor.feature_extractor, plain))
    assert other.predict([np.array([0, 4, 4, 0, 4, 3, 3, 6, 0], float)], []) == "aa c"


def test_frames_of_padding_have_no_part(folders, speech):
    task = task_of(folders["ctc"])
    batches = task.batches(read_table(speech), 24)
    together = task.evaluate(task.model, batches)
    one_by_one = task.evaluate(task.model, task.batches(read_table(speech), 1))
    assert together.predictions == one_by_one.predictions
    assert together.loss == pytest.approx(one_by_one.loss, rel=1e-4)
    batch = batches[0]
    output = task.model(**batch)
    frames = [task.model._get_feat_extract_output_lengths(n) for n in batch["attention_mask"].sum(1)]
    ((logits, examples),) = task.positions(output, batch)
    assert len(logits) == int(sum(frames)) < output.logits.shape[0] * output.logits.shape[1]
    assert torch.bincount(examples).tolist() == [int(n) for n in frames]


# -- what is refused --------------------------------------------------------------------------------------------------

SOUND = np.full(1600, 0.1, np.float32)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"audio": ["none.wav"], "text": ["a"]}, "the data, row 0: no file none.wav"),
        ({"audio": [SOUND, SOUND], "text": ["a", ""]},
         "the data, row 1: column 'text' is empty; fill it or remove the row"),
        ({"audio": [SOUND], "text": [" "]}, "the data, row 0: the tokenizer knows nothing of the target ' '; look at "),
        ({"audio": [SOUND], "text": ["XY"]}, "the data, row 0: the tokenizer knows nothing of the target 'XY'; look "),
        ({"path": [SOUND], "words": ["a"], "text": [["a"]]}, "the data, row 0: ['a'] in column 'text' is no text"),
        ({"sound": ["a.wav"]}, "the data has no column audio or path or file or file_name; name the audio with "),
    ],
)  # fmt: skip
def test_bad_rows(folders, kind, columns, sentence):
    with pytest.raises(DataError) as caught:
        task_of(folders[kind]).batches(columns)
    assert str(caught.value).startswith(sentence)


def test_targets_that_do_not_fit(folders):
    needed = "the data, row 0: the target needs 9 frames, the sound gives 4; correct or remove the row"
    for kind, text, sentence in (("ctc", "aabbc c", needed), ("whisper", "a" * 17, "row 0: the target has 18 tokens,")):
        with pytest.raises(DataError, match=sentence):
            task_of(folders[kind]).batches({"audio": [SOUND], "text": [text]})
    task = task_of(folders["ctc"])
    task.batches({"audio": [SOUND, SOUND], "text": ["aX", "b"]})
    assert task.notes == ["1 of 2 targets have characters that the tokenizer lacks"]


def test_folders_that_lack_something(tmp_path):
    folder = write_ctc_model(tmp_path)
    (folder / "preprocessor_config.json").rename(tmp_path / "kept")
    with pytest.raises(ModelError, match="holds no feature extractor"):
        SpeechRecognition.load_processor(folder)
    (tmp_path / "kept").rename(folder / "preprocessor_config.json")
    for name in ("vocab.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        SpeechRecognition.load_processor(folder)


def test_a_model_that_answers_nan(task, speech):
    batches = task.batches(read_table(speech), 8)
    model = type(task.model)(task.model.config).eval()
    with torch.no_grad():
        model.get_parameter("lm_head.weight" if not task.writes else "proj_out.weight").fill_(torch.nan)
    with pytest.raises(ModelError, match="the model answers NaN or infinity on this data"):
        task.evaluate(model, batches)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand(task, speech):
    import jiwer

    table = read_table(speech)
    got = task.evaluate(task.model, task.batches(table, 6))
    texts, losses = [], []
    for row in range(len(table)):
        batch = task.collate(task.encode(table.take([row])).features)
        labels = batch.pop("labels")
        with torch.no_grad():
            if task.writes:
                start = torch.full_like(labels[:, :1], 1)
                logits = task.model(**batch, decoder_input_ids=torch.cat([start, labels[:, :-1]], 1)).logits
                losses.append(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
                ids = task.model.generate(**batch, max_new_tokens=8, do_sample=False)[0]
                texts.append(task.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
            else:
                logits = task.model(**batch).logits[0]
                losses.append(torch.nn.functional.ctc_loss(
                    logits.log_softmax(-1), labels[0], torch.tensor(len(logits)), torch.tensor(labels.shape[1]),
                    reduction="sum",
                ))  # fmt: skip
                texts.append(task.processor.tokenizer.decode(logits.argmax(-1)))
    assert got.predictions == texts
    references = list(table.columns["text"])
    assert got.metric == "word error rate"
    assert got.values["word error rate"] == pytest.approx(jiwer.wer(references, texts))
    assert got.values["character error rate"] == pytest.approx(jiwer.cer(references, texts))
    if not task.writes:
        assert got.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    else:
        tokens = [len(text) + 1 for text in references]
        assert got.loss == pytest.approx(float(torch.stack(losses).sum()) / sum(tokens), rel=0.02)


def test_without_targets_the_dense_model_is_the_measure(task, speech):
    batches = task.batches(only_sounds(speech), 8)
    with pytest.raises(DataError, match="the data has no labels"):
        task.evaluate(task.model, batches)
    same = task.evaluate(task.model, batches, against=task.model)
    assert same.is_against_dense
    assert same.values == {"word error rate": 0.0, "character error rate": 0.0}
    assert same.flips == 0.0
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(1)
    other = type(task.model)(task.model.config).eval()
    apart = task.evaluate(other, batches, against=task.model)
    assert apart.kl > 1e-3
    batch = batches[0]
    labels = task.own_labels(task.model(**batch), batch)
    assert torch.isfinite(task.loss(task.model, {**batch, **labels}))
    if task.writes:  # all positions that the decoder reads, and no padding
        assert torch.equal(labels["labels"] != IGNORED, batch["decoder_attention_mask"].bool())


def test_silence_is_a_label_too(folders):
    task = task_of(folders["ctc"])
    batch = task.batches({"audio": [SOUND, SOUND]}, 2)[0]
    output = task.model(**batch)
    output.logits[..., 0] += 100  # blanks only
    labels = task.own_labels(output, batch)["labels"]
    assert labels.tolist() == [[IGNORED], [IGNORED]]
    assert torch.isfinite(task.loss(task.model, {**batch, "labels": labels}))


# -- training and pruning ---------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(folders, speech, task):
    mine = task_of(folders["whisper" if task.writes else "ctc"])
    batches = mine.batches(read_table(speech), 8)
    before = mine.evaluate(mine.model, batches)
    fine_tune(TorchHost.untraced(mine.model), mine, batches.examples, epochs=12, learning_rate=3e-3, batch_size=8,
              progress=False)  # fmt: skip
    after = mine.evaluate(mine.model, batches)
    assert after.loss < 0.6 * before.loss
    assert after.values["character error rate"] < before.values["character error rate"]


@pytest.mark.parametrize(("kind", "is_labelled"), [("ctc", True), ("whisper", False)])
def test_prune_and_reload(folders, kind, speech, tmp_path, is_labelled):
    table = read_table(speech) if is_labelled else only_sounds(speech)
    host, task = open_host(look(str(folders[kind]), None), OPTIONS)
    data = prepare(task, table, None, calibration_samples=8, batch_size=4, seed=0)
    stage = Stage(criteria.taylor, parse_pattern("ffn"), Uniform(0.5))
    tuning = Tuning(epochs=0 if is_labelled else 1, distil=not is_labelled)
    outcome = run("small", host, [stage], data, tuning, tmp_path / "small")
    assert outcome.difference == outcome.reload_difference == 0.0
    assert outcome.dense.is_against_dense is not is_labelled
    small = task_of(tmp_path / "small")
    ffn = [
        p for name, p in small.model.named_parameters() if name.endswith(("fc1.weight", "intermediate_dense.weight"))
    ]
    assert {len(p) for p in ffn} == {24}
    assert small.processor.tokenizer("ab c").input_ids == task.processor.tokenizer("ab c").input_ids
    assert small.processor.feature_extractor.to_dict() == task.processor.feature_extractor.to_dict()
    assert small.evaluate(small.model, small.batches(table), against=small.model).flips == 0.0


def test_statistics_count_what_is_run_for_them_and_not_what_makes_the_batches(folders, speech):
    host, task = open_host(look(str(folders["whisper"]), None), OPTIONS)
    batches = task.batches(only_sounds(speech), 8)  # whose decoder inputs the model writes while they are collated
    lazy = host.collect(["act_sq"], batches)
    eager = host.collect(["act_sq"], list(batches))
    name = "model.decoder.layers.0.fc1.weight"
    assert lazy.counts["act_sq"][name] == eager.counts["act_sq"][name]
    assert np.array_equal(lazy.mean("act_sq", name), eager.mean("act_sq", name))
    assert prune(host, criteria.wanda, parse_pattern("2:4"), None, batches).masks


def test_the_command_line(folders, speech, tmp_path, capsys):
    dense, small = tmp_path / "dense", tmp_path / "small"
    training = ("--epochs", "2", "--learning-rate", "3e-3", "--batch-size", "8")
    trained = result(capsys, "train", folders["ctc"], "--data", speech, "--output", dense, *training)
    assert trained["task"] == "automatic-speech-recognition"
    rows = speech.read_text().splitlines()[1:]
    data = speech.parent / "renamed.csv"
    data.write_text("\n".join(["recording,words", *rows]))
    given = ("--data", data, "--audio-column", "recording", "--target-column", "words")
    scored = result(capsys, "eval", dense, *given)
    assert list(scored["values"]) == ["word error rate", "character error rate"]
    options = ("--criterion", "magnitude", "--pattern", "ffn", "--sparsity", "0.5")
    pruned = result(capsys, "prune", dense, *given, *options, "--output", small)
    assert pruned["metric"] == "word error rate"
    assert pruned["drop"] == pytest.approx(pruned["pruned"] - pruned["dense"])  # more errors are a drop
    data.write_text("\n".join(["recording,words", *rows, "0.wav,"]))
    sentence = refused(capsys, "prune", dense, *given, *options, "--output", tmp_path / "not")
    assert sentence == f"{data}, line {len(rows) + 2}: column 'words' is empty; fill it or remove the row"
    assert not (tmp_path / "not").exists()
