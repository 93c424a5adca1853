"""Encoders that say which token stands behind a mask."""

import math

import numpy as np
import pytest
import torch

from secateur import Unit, criteria
from secateur.errors import DataError, ModelError
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.tasks import Options, find
from secateur.tasks.fill_mask import MASKED, FillMask
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.open import load_model
from secateur.training.fine_tune import fine_tune
from tests.tasks.language import WORDS, counting, opened, write, write_lines

MASK = 4


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("encoder") / "encoder", "bert", "BertForMaskedLM", num_hidden_layers=1)


def task_of(folder, **options):
    return FillMask(load_model(folder), load_tokenizer(folder), Options(max_length=32, **options))


def rows_of(task, count=6, words=20):
    return task.batches({"text": list(counting(count, words))}, 4)


def test_it_is_found_and_masks_the_same_tokens_each_time(encoder):
    task = task_of(encoder)
    assert type(find(task.model, task.processor)) is FillMask
    plain = [task.processor(text)["input_ids"] for text in counting(6, 20)]
    examples = rows_of(task).examples
    for feature, ids, wanted in zip(examples.features, plain, examples.references, strict=True):
        places = [i for i, token in enumerate(feature["input_ids"]) if token == MASK]
        assert len(places) == round(MASKED * 20) == 3
        assert [ids[i] for i in places] == wanted.tolist()
        assert [feature["labels"][i] for i in places] == wanted.tolist()
        assert all(label == IGNORED for i, label in enumerate(feature["labels"]) if i not in places)
    assert [f["input_ids"] for f in rows_of(task).examples.features] == [f["input_ids"] for f in examples.features]
    other = rows_of(task_of(encoder, seed=1)).examples
    assert [f["input_ids"] for f in other.features] != [f["input_ids"] for f in examples.features]


def test_bad_data(encoder):
    task = task_of(encoder)
    for texts, message in (
        (["w1", "[PAD] [UNK]"], "row 1 has no token that could be masked: .*; remove it"),
        (["w1 [MASK]", "w2 w3"], r"some texts hold \[MASK\] and others do not: 'w2 w3'"),
        ([None], "the data holds no text in column 'text'"),
    ):
        with pytest.raises(DataError, match=message):
            task.batches({"text": texts})
    task.processor.mask_token = None
    with pytest.raises(ModelError, match="the tokenizer of a BertForMaskedLM has no mask token; give it one"):
        task.batches({"text": ["w1"]})


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_stand_at_the_masks_of_a_padded_batch(encoder, side):
    task = task_of(encoder)
    task.processor.padding_side = side
    batch = task.batches({"text": [" ".join(WORDS[:20]), " ".join(WORDS[:7])]}, 2)[0]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 20)
    assert torch.equal(batch["labels"] != IGNORED, batch["input_ids"] == MASK)
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [3, 1]


def test_values_are_those_of_plain_loops(encoder):
    task = task_of(encoder)
    rows = rows_of(task)
    losses, hits = [], []
    for feature in rows.examples.features:
        labels = torch.tensor(feature["labels"])
        with torch.no_grad():
            logits = task.model(input_ids=torch.tensor([feature["input_ids"]])).logits[0][labels != IGNORED].double()
        wanted = labels[labels != IGNORED]
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
        hits += (logits.argmax(-1) == wanted).tolist()
    found = task.evaluate(task.model, rows, against=task.model)
    assert found.metric == "token accuracy"
    assert found.value == pytest.approx(np.mean(hits))
    assert found.values["pseudo-perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (found.kl, found.flips) == (pytest.approx(0, abs=1e-6), 0.0)


def test_texts_with_masks_of_their_own_are_compared_with_the_dense_model(encoder):
    task, dense = task_of(encoder), load_model(encoder)
    rows = task.batches({"text": ["w1 [MASK] w3", "[MASK] w8 [MASK]"]})
    assert rows.examples.references is None
    same = task.evaluate(task.model, rows, against=dense)
    assert same.is_against_dense
    assert (same.values, same.flips) == ({"token accuracy": 1.0}, 0.0)
    with torch.no_grad():
        task.model.cls.predictions.bias.copy_(torch.arange(50.0))
    other = task.evaluate(task.model, rows, against=dense)
    assert other.value == 1 - other.flips == 0
    assert task.shown(other.predictions[1], [])["tokens"] == [WORDS[-1]] * 2
    batch = rows[0]
    with torch.no_grad():
        output = task.model(**batch)
        labels = task.own_labels(output, batch)["labels"]
        assert torch.equal(labels != IGNORED, batch["input_ids"] == MASK)
        assert math.isfinite(float(task.model(**batch, labels=labels).loss))


def test_training_prune_and_reload(encoder, tmp_path):
    text = write_lines(tmp_path / "text.txt", counting(80, 20))
    host, task, material = opened(encoder, text, max_length=32)
    before = task.evaluate(host, material.test).loss
    fine_tune(host, task, material.train, epochs=4, learning_rate=5e-3, batch_size=8, progress=False)
    assert task.evaluate(host, material.test).loss < before - 0.2
    outcome = run("s", host, [Stage(criteria.taylor, Unit("head"), 0.5)], material, Tuning(), tmp_path / "small")
    assert outcome.reload_difference == 0
    assert outcome.pruned.flips > 0
    again = task.evaluate(load_model(tmp_path / "small"), material.test)
    assert again.values["pseudo-perplexity"] == pytest.approx(outcome.pruned.values["pseudo-perplexity"], rel=1e-5)
