"""Rows on which two models disagree, as examples for a person: which, in which order, and how they are shown."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from secateur.metrics.evaluation import Evaluation
from secateur.tasks.base.disagreements import disagreements
from secateur.tasks.base.evaluate import Reference, evaluate
from secateur.tasks.base.task import Examples, in_words
from tests.search import rows as rows_of

TASK = SimpleNamespace(
    same=lambda own, other: own == other, answer=lambda number: f"class {number}", expected=lambda number: str(number)
)


def examples(count, key="input_ids", **more):
    inputs = [f"row  {row} " + "x" * 500 * (row == 1) for row in range(count)]
    return Examples([{key: [1]}] * count, range(count), [0] * count, count, inputs, **more)


def evaluation(predictions, divergences):
    far = None if divergences is None else np.array(divergences)
    return Evaluation("t", len(predictions), "m", {"m": 0.0}, predictions=predictions, row_divergences=far)


def test_rows_of_the_same_answer_are_left_out_and_the_farthest_comes_first():
    found = evaluation([1, 0, 1, 1], [0.1, 9.0, 0.5, np.nan])
    shown = disagreements(TASK, examples(4), [0, 0, 0, 0], found)
    assert [(one.shown, one.divergence) for one in shown] == [("row 2", 0.5), ("row 0", 0.1), ("row 3", None)]
    assert {(one.kind, one.expected, one.dense, one.pruned) for one in shown} == {("text", "0", "class 0", "class 1")}
    assert len(disagreements(TASK, examples(4), [0, 0, 0, 0], found, most=2)) == 2
    assert disagreements(TASK, examples(1), [0], evaluation([0], None)) == []


def test_long_texts_are_cut_and_rows_without_words_are_of_another_kind():
    shown = disagreements(TASK, examples(2, "sound"), [1, 1], evaluation([0, 0], [1, 2]))
    assert [one.kind for one in shown] == ["other", "other"]
    assert len(shown[0].shown) == 400
    assert shown[0].shown.endswith("xxx...")


def test_images_are_shown_small():
    pictured = examples(1, "image", picture=lambda row: Image.new("L", (300, 30)))
    (shown,) = disagreements(TASK, pictured, [1], evaluation([0], [1.0]))
    assert shown.kind == "image"
    assert shown.shown.startswith("data:image/jpeg;base64,")
    assert len(shown.shown) < 2000


def test_answers_of_any_task_are_one_line():
    entities = [{"type": "PER", "text": "Anna", "start": 0}, {"type": "LOC", "text": "Rome", "start": 4}]
    assert in_words(entities) == "PER Anna, LOC Rome"
    assert in_words([["a", "X"], 0.25]) == "a, X, 0.25"


def test_the_divergences_of_rows_have_the_divergence_as_their_mean(tmp_path):
    host, task, rows = rows_of.classifier(tmp_path)
    small = host.copy()
    small.model.classifier.weight.data *= 0.5
    found = evaluate(task, small.model, rows.test, Reference(task, host.model, rows.test))
    assert found.row_divergences.shape == (rows.test.examples.count,)
    assert found.row_divergences.mean() == pytest.approx(found.kl)
    batch = rows.test[0]
    own, dense = (
        m.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits for m in (small.model, host.model)
    )
    p, q = dense.softmax(-1), own.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1).detach().numpy()
    np.testing.assert_allclose(found.row_divergences[rows.test.members(0)], by_hand, rtol=1e-3, atol=1e-6)
