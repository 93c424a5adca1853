"""Encoder-decoders that write a text for a text: T5, BART and Marian."""

import json

import numpy as np
import pytest
import torch

from secateur import Unit, criteria
from secateur.errors import DataError, ModelError
from secateur.jobs.prune_model import OwnLabels, Stage, Tuning, run
from secateur.metrics.texts import BLEU, CHRF
from secateur.tasks import Options, Reference, find
from secateur.tasks.base.evaluate import evaluate
from secateur.tasks.text2text_generation import Text2TextGeneration
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.open import load_model
from secateur.training.fine_tune import fine_tune
from tests import zoo
from tests.tasks.language import WORDS, counting, opened, write, write_columns

SIZES = {**zoo.both_sides(1, 4, 48), "d_model": 32, "max_position_embeddings": 40}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 0}
FAMILIES = {
    "t5": ("t5", None, {"num_layers": 1, "num_decoder_layers": 1, "eos_token_id": 3}),
    "bart": ("bart", "BartForConditionalGeneration", {**SIZES, **IDS, "forced_eos_token_id": None}),
    "marian": ("bart", "MarianMTModel", {**SIZES, **IDS, "forced_eos_token_id": None}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a family."""
    home = tmp_path_factory.mktemp("models")

    def of(name):
        family, cls, options = FAMILIES[name]
        return home / name if (home / name).exists() else write(home / name, family, cls, **options)

    return of


def task_of(folder, **options):
    return Text2TextGeneration(load_model(folder), load_tokenizer(folder), Options(**{"new_tokens": 8, **options}))


def pairs(count, words=5, seed=0):
    """Texts, and each of them as target."""
    texts = list(counting(count, words, seed))
    return {"source": texts, "target": texts}


def test_it_is_found_and_reads_sources_and_targets(folder):
    for name in FAMILIES:
        task = task_of(folder(name))
        assert type(find(task.model, task.processor)) is Text2TextGeneration
        rows = task.batches(pairs(3), 2)
        assert rows.examples.references == rows.examples.inputs == pairs(3)["target"]
        assert rows.examples.features[0]["labels"] == [*rows.examples.features[0]["input_ids"], 3]
    table = {"translation": [{"en": "w1 w2", "de": "w3"}, {"en": "w4", "de": "w5 w6"}]}
    assert task.batches(table).examples.references == ["w3", "w5 w6"]
    assert "the column translation is read from en to de" in task.notes
    back = task_of(folder("t5"), columns={"text": "de", "target": "en"})
    assert back.batches(table).examples.references == ["w1 w2", "w4"]
    short = task_of(folder("t5"), max_length=3).batches({"source": ["w1 w2 w3 w4"], "target": ["w5 w6 w7 w8"]})
    assert [len(short.examples.features[0][key]) for key in ("input_ids", "labels")] == [3, 3]
    assert short.examples.features[0]["labels"][-1] == 3


def test_bad_data(folder):
    task = task_of(folder("t5"))
    for rows, message in (
        ({"source": ["w1", ""], "target": ["w1", "w2"]}, "the data, row 1: column 'source' is empty"),
        ({"source": ["w1"], "target": [None]}, "the data, row 0: column 'target' is empty"),
        ({"words": ["w1"]}, "the data has no column text or source"),
        ({"translation": [{"en": "w1", "de": "w2"}, "w3"]}, "row 1: column 'translation' does not hold en and de"),
    ):
        with pytest.raises(DataError, match=message):
            task.batches(rows)
    with pytest.raises(DataError, match="--text-column names 2 columns; this task reads one"):
        task_of(folder("t5"), columns={"text": "source,target"}).batches(pairs(2))
    task.model.resize_token_embeddings(20)
    with pytest.raises(DataError, match="they do not belong together"):
        task.batches(pairs(2))
    task = task_of(folder("t5"))
    for config in (task.model.config, task.model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(ModelError, match="T5ForConditionalGeneration names no decoder_start_token_id; set it"):
        task.batches(pairs(2))


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_those_of_plain_loops(folder, name):
    import sacrebleu

    task = task_of(folder(name))
    data = {"source": list(counting(5, 5)), "target": list(counting(5, 3, seed=1))}
    rows = task.batches(data, 2)
    texts, losses = [], []
    for feature in rows.examples.features:
        ids = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            losses.append(task.model(input_ids=ids, labels=torch.tensor([feature["labels"]])).loss.item())
            written = [0]
            while len(written) <= 8 and written[1:][-1:] != [3]:
                logits = task.model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
                written.append(int(logits[0, -1].argmax()))
        texts.append(" ".join(WORDS[i - 5] for i in written[1:] if i >= 5))
    found = task.evaluate(task.model, rows)
    assert list(found.predictions) == texts
    assert found.values["chrF"] == pytest.approx(sacrebleu.corpus_chrf(texts, [data["target"]]).score)
    assert found.values["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(texts, [data["target"]]).score)
    assert found.values["exact match"] == np.mean([a == b for a, b in zip(texts, data["target"], strict=True)])
    sizes = [len(rows.members(i)) for i in range(len(rows))]
    assert len(losses) == sum(sizes)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)  # targets of one length: batches weigh the same


@pytest.mark.parametrize("name", FAMILIES)
def test_data_without_targets(folder, name):
    task, dense = task_of(folder(name)), load_model(folder(name))
    rows = task.batches({"source": list(counting(6, 5))}, 4)
    reference = Reference(task, dense, rows)
    same = evaluate(task, task.model, rows, reference)
    assert same.is_against_dense
    assert same.values["chrF"] == pytest.approx(100)
    assert (same.values["exact match"], same.flips) == (1.0, 0.0)
    assert same.kl == pytest.approx(0, abs=1e-6)
    own = OwnLabels(task, rows, dense)[0]
    real = own["decoder_attention_mask"] == 1
    assert torch.equal(own["labels"] == IGNORED, ~real)
    for ids, labels, mask in zip(own["decoder_input_ids"], own["labels"], real, strict=True):
        assert ids[mask][1:].tolist() == labels[mask][:-1].tolist()  # greedy: what follows is the most likely token
    with torch.no_grad():
        assert bool(dense(**own).loss.isfinite())
        for parameter in task.model.get_decoder().parameters():
            parameter.mul_(0.1)
    other = evaluate(task, task.model, rows, reference)
    assert other.kl > 0
    assert other.flips == 1 - other.values["exact match"]


def test_no_more_tokens_are_written_than_asked_for(folder):
    from secateur.cli.common import task_options

    model, tokenizer = load_model(folder("bart")), load_tokenizer(folder("bart"))
    model.generation_config.eos_token_id = None  # so that nothing ends a text
    for asked, wanted in ((3, 3), (100, 40)):  # the model has 40 positions
        task = Text2TextGeneration(model, tokenizer, task_options({"new_tokens": asked}))
        rows = task.batches({"source": ["w1 w2"]})
        assert [len(part) for part in Reference(task, model, rows).parts] == [wanted]


def test_another_dense_model_writes_anew(folder):
    task = task_of(folder("t5"))
    rows = task.batches({"source": list(counting(4, 5))}, 4)
    first = rows[0]["decoder_input_ids"]
    other = load_model(folder("t5"))
    with torch.no_grad():
        other.shared.weight.copy_(other.shared.weight.flip(0))
    Reference(task, other, rows)
    assert not torch.equal(first, rows[0]["decoder_input_ids"])


@pytest.mark.parametrize("name", ["t5", pytest.param("marian", marks=pytest.mark.slow)])
def test_training_prune_and_reload(folder, name, tmp_path):
    texts = list(counting(60, 4))
    data = write_columns(tmp_path / "rows.csv", ["source", "target"], [(text, text) for text in texts])
    host, task, material = opened(folder(name), data, new_tokens=6)
    before = task.evaluate(host, material.test).loss
    fine_tune(host, task, material.train, epochs=2, learning_rate=1e-2, batch_size=8, progress=False)
    assert task.evaluate(host, material.test).loss < before - 0.2
    stage = Stage(criteria.taylor, Unit("ffn"), 0.5)
    outcome = run("small", host, [stage], material, Tuning(epochs=1, distil=True), tmp_path / "small")
    assert outcome.reload_difference == 0
    assert outcome.difference < 1e-5
    again = task.evaluate(load_model(tmp_path / "small"), material.test)
    assert again.values == pytest.approx(outcome.tuned.values)


def test_statistics_of_rows_give_the_scores_of_sacrebleu():
    import sacrebleu

    texts = ["the cat sat on a mat", "hello", "", "a b c d e f"]
    wanted = ["the cat sat on the mat", "hello there", "x", "a b c d e f"]
    for metric, score in ((CHRF, sacrebleu.corpus_chrf), (BLEU, sacrebleu.corpus_bleu)):
        table = metric.rows(texts, wanted)
        assert metric.whole(table) == pytest.approx(score(texts, [wanted]).score)
        drawn = [0, 0, 3]
        some = [[texts[i] for i in drawn], [wanted[i] for i in drawn]]
        assert metric.whole(table[drawn]) == pytest.approx(score(some[0], [some[1]]).score)
        assert metric.whole(metric.rows([""], [""])) == 100
        assert metric.whole(metric.rows(["x y"], [""])) == 0


def test_json_lines_with_translations(folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"translation": {"en": text, "de": text}} for text in counting(20, 4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(folder("t5"))
    from secateur.tasks import read_table

    assert task.encode(read_table(file)).references == [row["translation"]["de"] for row in rows]
