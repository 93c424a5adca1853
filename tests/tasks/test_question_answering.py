"""Question answering: answers in any form, long contexts in pieces, questions without answers, training, pruning."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
import transformers

from secateur import criteria
from secateur.budget import Uniform
from secateur.data.table import as_table
from secateur.errors import DataError, ModelError
from secateur.jobs.open_task import open_to_train, prepare
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.metrics.answers import ANSWERS, f1, normalised
from secateur.select import Unit
from secateur.tasks import Options, find, read_table
from secateur.tasks.base.batches import OwnLabels
from secateur.tasks.find import task_of_config
from secateur.tasks.question_answering import Answer, QuestionAnswering, best_span
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model, open_module
from secateur.training.fine_tune import fine_tune
from tests.tasks import word_models
from tests.tasks.word_models import PLACES, questions, write_lines

ROW = {
    "question": "where ann",
    "context": "the books left ann in lima today",
    "answers": {"text": ["lima"], "answer_start": [22]},
}
NONE = {**ROW, "answers": {"text": [], "answer_start": []}}
LONG = " ".join(["the", "a", "two"] * 20)


def answerer(**options):
    return word_models.bert("BertForQuestionAnswering", **{"initializer_range": 0.1, **options})


def task_of(model=None, tokenizer=None, **options):
    return find(model or answerer(), tokenizer or word_models.word_pieces(), options=Options(**options))


def unlabelled(rows):
    return [{name: row[name] for name in ("question", "context")} for row in rows]


@pytest.fixture(scope="module")
def trained():
    """A model that knows the rule of `questions`, also where there is no answer, and its mean loss in training."""
    model = answerer()
    task = task_of(model)
    examples = task.encode(as_table(list(questions(600, impossible=0.2))))
    loss = fine_tune(
        TorchHost.untraced(model), task, examples, epochs=6, learning_rate=3e-3, batch_size=16, progress=False
    )
    return model, loss


# -- metrics and spans ------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    assert normalised(" The  quick, brown Fox! An  end. ") == "quick brown fox end"
    assert f1("the brown fox", "A fox ran") == pytest.approx(2 * 1 / (2 + 2))
    assert f1("fox fox", "fox") == pytest.approx(2 * 1 / (2 + 1))
    own = ["The Eiffel tower.", "in paris", "", "", "rome"]
    gold = [["eiffel tower"], ["paris", "in Paris, France"], [], ["rome"], []]
    score, exact = ({m.name: m.rows(own, gold)[:, 0].tolist() for m in ANSWERS}).values()
    assert score == pytest.approx([1, 2 * 2 / (2 + 3), 1, 0, 0])
    assert exact == [1, 0, 1, 0, 0]
    assert [m.whole(m.rows(own, own)) for m in ANSWERS] == [1, 1]  # against answers of another model


@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_of_all(seed):
    logits = np.random.default_rng(seed).normal(size=(2, 9)).astype(np.float32)
    spans = [(i, j) for i in range(9) for j in range(i, min(9, i + 3))]
    wanted = max(spans, key=lambda span: float(logits[0, span[0]]) + float(logits[1, span[1]]))
    score, start, end = best_span(logits, longest=3)
    assert (start, end) == wanted
    assert score == pytest.approx(float(logits[0, start] + logits[1, end]))
    assert best_span(np.zeros((2, 0)))[0] == -np.inf


def test_an_answer_is_a_text_that_knows_its_place():
    answer = Answer("ann in lima", 7, 11, 0.5)
    assert answer == "lima"
    for twin in (copy.copy(answer), pickle.loads(pickle.dumps(answer))):
        assert (twin, twin.start, twin.end, twin.probability) == ("lima", 7, 11, 0.5)


# -- rows to batches --------------------------------------------------------------------------------------------------


def test_found_from_the_config(tmp_path):
    word_models.write_answerer(tmp_path)
    assert task_of_config(transformers.AutoConfig.from_pretrained(tmp_path)) is QuestionAnswering
    model = load_model(tmp_path)
    model.config.architectures = ["BertForTokenClassification"]  # as where a checkpoint gets another head
    assert isinstance(find(model), QuestionAnswering)


def test_labels_are_tokens_of_the_answer():
    task = task_of()
    rows = [ROW, NONE, {"question": "where", "context": "limas today", "answers": "limas"}]
    batch = task.collate(task.encode(as_table(rows)).features)
    # [CLS] where ann [SEP] the books left ann in lima today [SEP]; [CLS] where [SEP] lima ##s today [SEP]
    assert batch["start_positions"].tolist() == [9, 0, 3]
    assert batch["end_positions"].tolist() == [9, 0, 4]
    assert batch["_allowed"].nonzero().tolist() == [
        *([row, i] for row in (0, 1) for i in range(4, 11)),
        *([2, i] for i in (3, 4, 5)),
    ]
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 8
    assert task.collate(task.encode(as_table(rows)).features, pad_to=20)["_allowed"].shape == (3, 20)


def test_padding_on_the_left():
    tokenizer = word_models.word_pieces()
    tokenizer.padding_side = "left"
    task = task_of(tokenizer=tokenizer)
    rows = [ROW, {"question": "where", "context": "limas today", "answers": "limas"}, NONE]
    batch = task.collate(task.encode(as_table(rows)).features)
    assert batch["start_positions"].tolist() == [9, 3 + 5, 0]
    assert batch["_none"].tolist() == [0, 5, 0]
    assert batch["_allowed"][1].nonzero().flatten().tolist() == [8, 9, 10]


FORMS = {
    "SQuAD": {"text": ["lima", "in lima"], "answer_start": [22, 19]},
    "a list of objects": [{"text": "lima", "answer_start": 22}, {"text": "in lima", "answer_start": 19}],
    "texts": ["lima", "in lima"],
    "texts by name": {"text": ["lima", "in lima"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_answers(form):
    examples = task_of().encode(as_table([{**ROW, "answers": FORMS[form]}]))
    assert examples.references == [["lima", "in lima"]]
    assert examples.features[0]["start_positions"] == 9


def test_a_file_of_squad(tmp_path):
    asked = [
        {"id": "a", "question": "where ann", "answers": [{"text": "lima", "answer_start": 22}], "is_impossible": False},
        {"id": "b", "question": "where bob", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "train-v2.0.json"
    article = {"title": "t", "paragraphs": [{"context": ROW["context"], "qas": asked}]}
    path.write_text(json.dumps({"version": "v2.0", "data": [article, article]}))
    examples = task_of().encode(read_table(path))
    assert examples.references == [["lima"], []] * 2
    assert examples.inputs[1] == f"where bob | {ROW['context']}"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a"}]}]}))
    with pytest.raises(
        DataError, match=r"train-v2.0.json, article 0 has a paragraph without a list of questions \(qas\)"
    ):
        read_table(path)


@pytest.mark.parametrize("empty", [[], {"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}], ids=str)
def test_no_answer(empty):
    task = task_of()
    assert task.encode(as_table([{**ROW, "answers": empty}])).references == [[]]
    assert task.may_be_empty


def test_columns_by_name():
    table = as_table({"q": [ROW["question"]], "passage": [ROW["context"]], "gold": ["lima"]})
    task = task_of(columns={"text": "q,passage", "target": "gold"})
    assert task.encode(table).references == [["lima"]]
    with pytest.raises(DataError, match="has no column question,context; name the text with --text-column"):
        task_of().encode(table)
    with pytest.raises(DataError, match="--text-column must name two columns, the question and the context"):
        task_of(columns={"text": "q"}).encode(table)
    with pytest.raises(DataError, match="this task reads no label"):
        task_of(columns={"text": "q,passage", "label": "gold"}).encode(table)


def test_long_contexts_go_in_pieces_that_overlap():
    context = f"{LONG} ann in lima {LONG}"
    row = {**ROW, "context": context, "answers": "lima"}
    task = task_of(max_length=24, stride=6)  # 19 tokens of context in a piece
    examples = task.encode(as_table([ROW, row, ROW]))
    assert examples.count == 3
    assert list(examples.rows) == [0] + [1] * (len(examples.features) - 2) + [2]
    pieces = examples.features[1:-1]
    words = [(int(a), int(b)) for a, b in pieces[0]["_offsets"]]
    for before, after in itertools.pairwise(pieces):
        assert len(before["_offsets"]) == 19
        assert before["_offsets"][-6:].tolist() == after["_offsets"][:6].tolist()
        words += [(int(a), int(b)) for a, b in after["_offsets"][6:]]
    assert [context[a:b] for a, b in words] == context.split()
    place = context.index("lima")
    for piece in pieces:
        holds = piece["_offsets"][0, 0] <= place and piece["_offsets"][-1, 1] >= place + 4
        start, end = piece["start_positions"], piece["end_positions"]
        assert start == end
        assert (start > 0) == holds
        if holds:
            assert piece["input_ids"][start] == task.processor.convert_tokens_to_ids("lima")
    assert sum(piece["start_positions"] > 0 for piece in pieces) in (1, 2)
    assert not task.notes
    task.encode(as_table([{**row, "answers": context[:200]}]))
    assert task.notes[0].startswith("answers that no piece of their context holds as a whole: 1;")


def test_the_answer_of_several_pieces():
    task = task_of(max_length=24, stride=6)
    examples = task.encode(as_table([{**ROW, "context": f"{LONG} ann in lima {LONG}", "answers": "lima"}]))
    parts = [np.zeros((2, 1 + len(f["_tokens"])), np.float32) for f in examples.features]
    number = next(i for i, f in enumerate(examples.features) if f["start_positions"])
    where = int(np.flatnonzero(examples.features[number]["_tokens"] == examples.features[number]["start_positions"])[0])
    parts[number][:, 1 + where] = 3
    for i, part in enumerate(parts):
        part[:, 0] = 5 if i != number else 2  # pieces without the answer say so
    answer = task.predict(parts, examples.features)
    assert answer == "lima"
    assert answer.start == len(f"{LONG} ann in ")
    others = len(parts[number][0]) - 2
    assert answer.probability == pytest.approx((np.exp(3) / (np.exp(3) + np.exp(2) + others)) ** 2, rel=1e-5)
    parts[number][:, 0] = 4
    assert task.predict(parts, examples.features) == "lima"  # every question of the data has an answer
    task.may_be_empty = True
    nothing = task.predict(parts, examples.features)
    assert (nothing, nothing.start, nothing.end) == ("", 0, 0)


BAD = {
    "outside the text": (
        {"answers": {"text": ["lima"], "answer_start": [90]}},
        "at answer_start 90 is outside the con",
    ),
    "before the text": ({"answers": {"text": ["lima"], "answer_start": [-1]}}, "at answer_start -1 is outside the con"),
    "another text": (
        {"answers": {"text": ["lima"], "answer_start": [21]}},
        "context has ' lim' at answer_start 21, not",
    ),
    "not in the text": ({"answers": "rome"}, "the answer 'rome' does not stand in the context"),
    "no number": ({"answers": {"text": ["lima"], "answer_start": ["x"]}}, "at answer_start 'x' is outside the context"),
    "more texts": ({"answers": {"text": ["lima", "a"], "answer_start": [22]}}, "2 answers and 1 places (answer_start)"),
    "a number": ({"answers": 7}, "7 in column 'answers' is no answer; write a text that stands in"),
    "nothing": ({"answers": None}, "column 'answers' is empty; write the answer, or an empty list"),
    "no question": ({"question": ""}, "column 'question' is empty"),
    "blanks": ({"question": "  "}, "column 'question' is empty"),
    "no context": ({"context": None}, "column 'context' is empty"),
    "a list": ({"context": ["lima"]}, "['lima'] in column 'context' is no text"),
    "a long question": ({"question": LONG[:180]}, "leaves no room for its context in 48 tokens; pass --max-length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, tmp_path):
    change, sentence = BAD[case]
    path = write_lines(tmp_path / "bad.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(DataError) as caught:
        task_of(max_length=48).encode(read_table(path))
    assert sentence in str(caught.value)
    assert "bad.jsonl, line 2" in str(caught.value)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="a ByT5Tokenizer does not tell; save a fast tokenizer"):
        task_of(tokenizer=transformers.ByT5Tokenizer()).encode(as_table([ROW]))


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_training_and_evaluation(trained):
    model, loss = trained
    assert loss < 1.5  # it begins at about ln 12 = 2.5
    rows = list(questions(60, seed=1, impossible=0.2))
    task = task_of(model)
    result = task.evaluate(model, task.batches(rows, batch_size=8))
    assert list(result.predictions) == by_hand(model, rows)
    gold = [(row["answers"]["text"] or [""])[0] for row in rows]
    right = [answer == wanted for answer, wanted in zip(result.predictions, gold, strict=True)]
    assert result.values["exact match"] == pytest.approx(np.mean(right))
    assert result.values["answer F1"] >= result.values["exact match"] > 0.8
    assert "" in result.predictions


def by_hand(model, rows):
    """The answers to rows, each run alone and read without the task."""
    tokenizer = word_models.word_pieces()
    found = []
    for row in rows:
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            output = model(**encoded)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        places = [i for i, number in enumerate(encoded.sequence_ids()) if number == 1]
        pairs = [(i, j) for i in places for j in places if i <= j < i + 30]
        i, j = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
        answer = row["context"][offsets[i][0] : offsets[j][1]]
        found.append("" if start[0] + end[0] > start[i] + end[j] else answer)
    return found


def test_data_without_answers(trained):
    model, _ = trained
    task = task_of(model)
    batches = task.batches(unlabelled(questions(20, seed=2)), batch_size=8)
    same = task.evaluate(model, batches, model)
    assert same.values == {"answer F1": 1, "exact match": 1}
    assert (same.kl, same.flips, same.loss) == (0, 0, None)
    other = task.evaluate(answerer(seed=1), batches, model)
    assert other.kl > 0.1
    assert other.flips > 0.2
    assert set(same.predictions) <= set(PLACES)
    with pytest.raises(DataError, match="no labels"):
        task.evaluate(model, batches)


def test_divergence_leaves_out_the_question_and_padding(trained):
    model, _ = trained
    task, other = task_of(model), answerer(seed=1)
    batch = task.batches(unlabelled([ROW, {"question": "where", "context": "limas today"}]))[0]
    inputs = {name: value for name, value in batch.items() if not name.startswith("_")}
    with torch.no_grad():
        dense, own = model(**inputs), other(**inputs)
    for row, places in enumerate(([0, *range(4, 11)], [0, 3, 4, 5])):
        wanted = 0.0
        for name in ("start_logits", "end_logits"):
            p, q = (output[name][row, places].log_softmax(-1) for output in (dense, own))
            wanted += float((p.exp() * (p - q)).sum())
        assert float(task.divergence(own, dense, batch)[row]) == pytest.approx(wanted, rel=1e-4)


def test_own_labels_give_a_loss(trained):
    model, _ = trained
    task = task_of(model)
    (batch,) = OwnLabels(task, task.batches(unlabelled([ROW])), model)
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [9]
    assert bool(task.loss(model, batch).isfinite())


def test_an_answer_for_a_person(trained):
    model, _ = trained
    task = task_of(model)
    result = task.evaluate(model, task.batches([ROW]))
    shown = json.loads(json.dumps(task.shown(result.predictions[0], ())))
    assert next(iter(shown.values())) == "lima"
    assert (shown["start"], shown["end"]) == (22, 26)
    assert 0.3 < shown["probability"] <= 1


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_labelled", [True, False], ids=["answers", "no answers"])
def test_prune_and_reload(trained, tmp_path, is_labelled):
    model, _ = trained
    rows = list(questions(60, seed=3, impossible=0.2))
    task = task_of(model)
    table = as_table(rows if is_labelled else unlabelled(rows))
    material = prepare(task, table, None, calibration_samples=32, batch_size=8, seed=0)
    stage = Stage(criteria.taylor, Unit("head"), Uniform(0.25))
    tuning = Tuning(epochs=1, distil=True, learning_rate=1e-3)
    outcome = run("small", open_module(model), [stage], material, tuning, tmp_path / "small")
    assert outcome.dense.is_against_dense != is_labelled
    assert outcome.pruned.kl > 0
    assert outcome.difference < 1e-5
    assert outcome.reload_difference == 0
    again = load_model(tmp_path / "small")
    assert again.bert.encoder.layer[0].attention.self.query.weight.shape == (24, 32)


def test_an_encoder_gets_a_head_for_answers(tmp_path):
    word_models.write_model(tmp_path, "BertForSequenceClassification", num_labels=3)
    new = []
    task = open_to_train(str(tmp_path), "question-answering", as_table([ROW]), Options(), new_head=new.extend)
    assert new == ["qa_outputs.bias", "qa_outputs.weight"]
    assert bool(task.loss(task.model, task.batches([ROW])[0]).isfinite())
