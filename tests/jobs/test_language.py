"""A language model beside the dense one and beside fewer bits; tasks of lm-evaluation-harness."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.errors import DataError, SecateurError
from secateur.jobs.language import harness
from secateur.jobs.language.rows import DENSE, THIS, Models, Row, Text, compare, verdicts
from secateur.scores import text_score
from secateur.torch.data.run_windows import evaluate_text, logits_of, recorded
from tests import zoo
from tests.deploy.gguf.models import TEXTS, byte_level, decoder
from tests.text_models import write_documents, write_model


def row(whose, form, size, losses):
    """A row with made-up losses of four windows."""
    return Row(whose, form, size * 10**6, text_score(np.array(losses), np.arange(8).reshape(4, 2)))


def test_the_sentence_names_the_best_dense_row_that_is_no_larger():
    rows = [
        row(DENSE, "float32", 400, [1.0, 2.0, 3.0, 4.0]),
        row(DENSE, "q8_0", 120, [1.0, 2.1, 3.0, 4.1]),
        row(DENSE, "q4_0", 60, [1.2, 2.2, 3.2, 4.3]),
    ]
    worse = row(THIS, "q8_0", 90, [1.5, 2.6, 3.5, 4.6])
    better = row(THIS, "q8_0", 90, [1.1, 2.1, 3.1, 4.1])
    close = row(THIS, "q8_0", 90, [1.1, 2.3, 3.1, 4.4])
    least = row(THIS, "q4_0", 50, [2.2, 3.2, 4.2, 5.2])
    (sentence,) = verdicts([*rows, worse])
    assert sentence.startswith("this model q8_0 (90.0 MB) beside dense q4_0 (60.0 MB): loss +0.3250 [+0.2760, +0.3740]")
    assert sentence.endswith("; the dense model is smaller and better")
    (sentence,) = verdicts([*rows, better])
    assert "loss -0.1250 [" in sentence
    assert sentence.endswith("; the dense model is smaller, but worse")
    (sentence,) = verdicts([*rows, close])
    assert "loss +0.0000 [" in sentence
    assert sentence.endswith("; the dense model is smaller, and the text shows no difference")
    (sentence,) = verdicts([*rows, replace(worse, bytes=60_000_000)])
    assert sentence.endswith("; the dense model is as large and better")
    (sentence,) = verdicts([*rows, least])
    assert "(50.0 MB) beside dense q4_0 (60.0 MB): loss +0.9750 [" in sentence
    assert sentence.endswith("; this model is smaller than every dense row")
    assert verdicts([worse]) == verdicts([rows[0], worse]) == []  # nothing was rounded


def test_one_window_shows_no_difference():
    score = text_score(np.array([1.0]), np.arange(2).reshape(1, 2))
    other = text_score(np.array([9.0]), np.arange(2).reshape(1, 2))
    rows = [Row(DENSE, "float32", 9, score), Row(DENSE, "q8_0", 2, score), Row(THIS, "q8_0", 2, other)]
    assert verdicts(rows)[0].endswith(": loss +8.0000; the dense model is as large, and the text shows no difference")


def test_recorded_answers_are_those_of_the_model(monkeypatch):
    model = zoo.build("llama")
    windows = torch.arange(24).reshape(2, 12) % zoo.VOCAB
    with torch.no_grad():
        answers = recorded(model, windows)
        for window in windows:
            assert torch.allclose(answers(window), logits_of(model, window), atol=1e-6)
        assert evaluate_text(model, windows, answers).kl == pytest.approx(0, abs=1e-9)
        monkeypatch.setattr("secateur.torch.data.run_windows.KEPT_BYTES", 1)
        assert torch.equal(recorded(model, windows)(windows[0]), logits_of(model, windows[0]))


def test_rows_of_both_models(tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    write_model(tmp_path / "dense")
    write_model(tmp_path / "small", intermediate_size=32)
    documents = write_documents(tmp_path / "text.txt").read_text().splitlines()
    models = Models(str(tmp_path / "small"), str(tmp_path / "dense"), {}, ("q8_0", "q4_0"), threads=1)
    seen = []
    found = compare(models, Text("text", documents, 16, 5), lambda items, what: seen.append(what) or items)
    assert [r.name for r in found.rows] == [f"{w} {f}" for w in (DENSE, THIS) for f in ("float32", "q8_0", "q4_0")]
    dense, q8, q4, small, small8, small4 = (r.score for r in found.rows)
    assert found.score is small
    assert dense.delta is None
    assert 0 < q8.kl < q4.kl < small.kl
    assert small.loss - dense.loss == pytest.approx(small.delta)
    assert small8.dense_losses == pytest.approx(small.dense_losses)
    assert {s.windows for s in (dense, q8, small4)} == {5}
    sizes = [r.bytes for r in found.rows]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[5]
    assert "windows, dense q4_0" in seen
    assert all(r.speed is None for r in found.rows)
    assert found.notes[0].startswith("dense was not timed: the tokenizer cannot be written as GGUF: it is of the kind")
    alone = compare(Models(models.model, None, {}, ("q8_0",)), Text("text", documents, 16, 5))
    assert [r.name for r in alone.rows] == ["this model float32", "this model q8_0"]
    assert alone.score.losses == pytest.approx(small.losses)
    assert 0 < alone.rows[1].score.kl < small.kl


@pytest.mark.slow
def test_rows_are_timed_on_llama_cpp(tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")
    decoder(layers=1).save_pretrained(tmp_path / "llm")
    byte_level().save_pretrained(tmp_path / "llm")
    models = Models(str(tmp_path / "llm"), None, {}, ("q8_0",), threads=1)
    found = compare(models, Text("text", [" ".join(TEXTS)] * 4, 16, 2))
    assert [(r.form, r.speed.prompt > 0, r.speed.decode > 0) for r in found.rows] == [
        ("float32", True, True),
        ("q8_0", True, True),
    ]
    assert found.rows[0].speed.bytes > found.rows[1].speed.bytes  # f16 beside q8_0
    (note,) = found.notes
    assert note.startswith("speeds: llama.cpp, 1 thread, models in turn, 64 tokens read and 32 written;")


def results(*values):
    """What the harness says of a task with a row for each value."""
    samples = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
    summary = {"alias": "t", "acc,none": sum(values) / len(values), "acc_stderr,none": 0.1, "sample_len": 4}
    return {"results": {"t": summary}, "samples": {"t": samples}}


def test_a_task_has_the_difference_paired_over_rows(monkeypatch):
    monkeypatch.setattr(harness, "check", lambda tasks: None)
    answers = {"small": results(1.0, 0.0, 0.0, 1.0), "dense": results(1.0, 1.0, 0.0, 1.0)}
    monkeypatch.setattr(harness, "_evaluated", lambda models, source, tasks: answers[source])
    (score,) = harness.run_tasks(Models("small", "dense"), harness.Tasks(["t"]))
    assert (score.task, score.metric, score.rows) == ("t", "acc", 4)
    assert (score.value, score.stderr, score.dense) == (0.5, 0.1, 0.75)
    assert score.delta == -0.25
    assert score.interval == pytest.approx((-0.25 - 1.96 * 0.25, -0.25 + 1.96 * 0.25))  # of 0, -1, 0, 0
    (alone,) = harness.run_tasks(Models("small"), harness.Tasks(["t"]))
    assert (alone.value, alone.dense, alone.delta) == (0.5, None, None)


def test_a_folder_of_tasks_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no folder of tasks at .*nowhere; pass one that holds their YAML files"):
        harness.check(harness.Tasks(["t"], tmp_path / "nowhere"))


TASK = """task: likely
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" w1", " w2"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_the_harness_runs_a_task_of_a_folder(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    write_model(tmp_path / "llm")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tasks / "rows.jsonl"
    data.write_text("".join(f'{{"text": "w{i} w{i + 1}", "label": {i % 2}}}\n' for i in range(6)))
    (tasks / "likely.yaml").write_text(TASK.format(data=data))
    (score,) = harness.run_tasks(
        Models(str(tmp_path / "llm"), str(tmp_path / "llm")), harness.Tasks(["likely"], tasks, limit=4)
    )
    assert (score.task, score.metric, score.rows, score.delta) == ("likely", "acc", 4, 0.0)
    assert score.value == score.dense
    with pytest.raises(DataError, match="lm_eval could not run unknown"):
        harness.run_tasks(Models(str(tmp_path / "llm")), harness.Tasks(["unknown"], tasks))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_a_sentence_says_what_to_install():
    with pytest.raises(SecateurError, match=r"lm_eval is not installed; `pip install 'secateur\[lm-eval\]'`"):
        harness.run_tasks(Models("small"), harness.Tasks(["t"]))
