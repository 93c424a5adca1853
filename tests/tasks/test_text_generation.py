"""Language models on windows of text: perplexity, token accuracy, training and removal."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur import Unit, criteria
from secateur.data.table import as_table
from secateur.errors import DataError, ModelError
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.metrics.drop import drop
from secateur.tasks import Options, Reference, compare, find
from secateur.tasks.base.evaluate import evaluate
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.run_windows import divergences, evaluate_text
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.open import load_model
from secateur.training.fine_tune import fine_tune
from tests import zoo
from tests.tasks.language import counting, opened, write, write_columns, write_lines


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llm") / "llm", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("text") / "text.txt", counting(60, 20))


def task_of(llm, **options):
    return TextGeneration(load_model(llm), load_tokenizer(llm), Options(max_length=16, **options))


def rows_of(task, count=6, words=20):
    return task.batches({"text": list(counting(count, words))}, 4)


def test_it_is_found_and_packs_documents(llm):
    task = task_of(llm)
    assert type(find(task.model, task.processor)) is TextGeneration
    examples = rows_of(task).examples
    ids = [i for document in counting(6, 20) for i in [*task.processor(document)["input_ids"], 3]]  # 3 ends a text
    assert [i for f in examples.features for i in f["input_ids"]] == ids[: 16 * (len(ids) // 16)]
    assert examples.count == len(examples.references) == len(ids) // 16
    assert examples.references[1].tolist() == ids[17:32]
    assert task.encode(as_table({"text": ["", "w1 " * 16, None]})).count == 1  # empty cells are no documents


def test_bad_data(llm):
    task = task_of(llm)
    for rows, message in (
        ({"text": ["w1 w2"]}, "the data has 3 tokens, fewer than one window of 16"),
        ({"text": ["", None]}, "the data holds no text in column 'text'"),
        ({"text": ["w1", ["w2"]]}, "the data, row 1: .* in column 'text' is no text"),
        ({"words": ["w1"]}, "the data has no column text or content"),
    ):
        with pytest.raises(DataError, match=message):
            task.batches(rows)
    two = replace(task.options, columns={"text": "text,more"})
    with pytest.raises(DataError, match="--text-column names 2 columns; this task reads one"):
        TextGeneration(task.model, task.processor, two).batches({"text": ["w1"], "more": ["w2"]})
    with pytest.raises(DataError, match="windows of 65 tokens exceed the 64 positions"):
        TextGeneration(task.model, task.processor, Options(max_length=65)).batches({"text": ["w1"]})


def test_collate_pads(llm):
    task = task_of(llm)
    features = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = task.collate(features, pad_to=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, IGNORED], [8, IGNORED, IGNORED, IGNORED]]
    assert task.collate([{"input_ids": [5, 6]}]).keys() == {"input_ids", "attention_mask"}


def test_values_are_those_of_plain_loops(llm):
    task = task_of(llm)
    rows = rows_of(task)
    losses, hits = [], []
    for feature in rows.examples.features:
        ids = torch.tensor(feature["input_ids"])
        with torch.no_grad():
            logits = task.model(input_ids=ids[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
        hits.append((logits.argmax(-1) == ids[1:]).double().mean().item())
    found = task.evaluate(task.model, rows)
    assert found.metric == "perplexity"
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.values["token accuracy"] == pytest.approx(np.mean(hits))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_agrees_with_the_perplexity_of_windows(llm):
    task, dense = task_of(llm), load_model(llm)
    with torch.no_grad():
        for parameter in task.model.model.layers[0].mlp.parameters():
            parameter.mul_(0.5)
    rows = rows_of(task)
    found = task.evaluate(task.model, rows, against=dense)
    windows = torch.tensor([feature["input_ids"] for feature in rows.examples.features])
    wanted = evaluate_text(task.model, windows, dense)
    assert found.value == pytest.approx(wanted.perplexity, rel=1e-6)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-5)
    assert found.flips == pytest.approx(wanted.flips)
    assert 0 < found.flips < 1


def test_a_point_is_a_hundredth_of_the_dense_perplexity(llm):
    task = task_of(llm)
    rows = rows_of(task)
    reference = Reference(task, task.model, rows)
    same = evaluate(task, task.model, rows, reference)
    assert (same.kl, same.flips) == (0.0, 0.0)
    found = compare(reference.evaluation(), same)
    assert found.drop == 0
    assert found.point == pytest.approx(same.value / 100)
    table = np.array([[4.0, 2.0], [8.0, 2.0]])
    worse = drop(task.metrics(has_references=True)[0], table, table + np.array([0.2, 0]))
    assert worse.drop == pytest.approx(math.exp(12.4 / 4) - math.exp(3))  # lower is better, so this is a drop
    assert worse.interval[0] > 0


def test_divergences_in_parts_have_the_gradients_of_the_whole():
    torch.manual_seed(0)
    logits, dense = torch.randn(700, 9, requires_grad=True), torch.randn(700, 9)
    parts = divergences(logits, dense, 2.0)
    p, q = (dense / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    whole = 4 * (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(parts, whole)
    (own,) = torch.autograd.grad(parts.sum(), logits)
    (wanted,) = torch.autograd.grad(whole.sum(), logits)
    torch.testing.assert_close(own, wanted)


def test_padding_is_no_part_of_a_window(llm):
    task = task_of(llm)
    short = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}]
    with torch.no_grad():
        pairs = []
        for batch in (task.collate(short), task.collate(short, pad_to=9)):
            output = task.model(**batch)
            pairs.append((task.read(task.model, output, batch)[0], task.divergence(output, output, batch)))
    (plain, kl), (padded, padded_kl) = pairs
    assert plain.answers.tolist() == padded.answers.tolist()
    assert plain.loss == pytest.approx(padded.loss, rel=1e-5)
    assert kl.tolist() == padded_kl.tolist() == [0.0]


def test_own_labels_are_the_most_likely_next_tokens(llm):
    task = task_of(llm)
    batch = rows_of(task)[0]
    with torch.no_grad():
        output = task.model(**batch)
        labels = task.own_labels(output, batch)["labels"]
        assert torch.equal(labels[:, 1:], output.logits[:, :-1].argmax(-1))
        loss = task.model(**{**batch, "labels": labels}).loss
    nearest = -output.logits[:, :-1].float().log_softmax(-1).max(-1).values.mean()
    assert float(loss) == pytest.approx(float(nearest), rel=1e-5)


def test_batches_are_small_where_the_vocabulary_is_large(llm, monkeypatch):
    task = task_of(llm)
    monkeypatch.setattr("secateur.tasks.base.tokens.MOST_LOGITS", 3 * 16 * zoo.VOCAB * 4)
    assert [len(batch["input_ids"]) for batch in task.batches({"text": list(counting(6, 20))}, 32)][:2] == [3, 3]


def test_a_model_with_nan_is_refused(llm):
    task = task_of(llm)
    with torch.no_grad():
        task.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="the model answers NaN or infinity"):
        task.evaluate(task.model, rows_of(task))


def test_training_prune_and_reload(llm, text, tmp_path):
    host, task, material = opened(llm, text, max_length=16)
    before = task.evaluate(host, material.test).loss
    fine_tune(host, task, material.train, epochs=4, learning_rate=1e-2, batch_size=8, progress=False)
    assert task.evaluate(host, material.test).loss < before - 1
    stage = Stage(criteria.taylor, Unit("ffn", "kv"), 0.5)
    tuning = Tuning(epochs=1, learning_rate=1e-2, distil=True)
    outcome = run("small", host, [stage], material, tuning, tmp_path / "small")
    assert outcome.reload_difference == 0
    assert outcome.difference < 1e-5
    assert max(outcome.dense.value, outcome.tuned.value) < outcome.pruned.value
    small = load_model(tmp_path / "small")
    assert small.model.layers[0].mlp.up_proj.out_features == 24
    again = task.evaluate(small, material.test)
    assert again.value == pytest.approx(outcome.tuned.value, rel=1e-5)
    assert load_tokenizer(tmp_path / "small").eos_token == "[EOS]"


def test_tables_with_labels_make_classifiers_of_language_models(llm, tmp_path):
    from secateur.jobs.open_task import open_to_train
    from secateur.tasks import read_table

    rows = write_columns(tmp_path / "rows.csv", ["text", "label"], [("w1 w2", "a"), ("w3", "b")])
    assert open_to_train(str(llm), None, read_table(rows), Options()).name == "text-classification"
    plain = write_lines(tmp_path / "plain.txt", ["w1 w2", "w3"])
    assert open_to_train(str(llm), None, read_table(plain), Options()).name == "text-generation"


def test_models_of_other_vocabularies_are_not_compared(llm):
    task = task_of(llm)
    wider = load_model(llm)
    wider.resize_token_embeddings(60)
    with pytest.raises(DataError, match=r"outputs of shape \(4, 16, 50\) and \(4, 16, 60\) cannot be compared"):
        task.evaluate(task.model, rows_of(task), against=wider)
