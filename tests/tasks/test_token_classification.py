"""Token classification: words and tags of any form, entities counted by hand, training, pruning, data without tags."""

import json

import datasets
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
from secateur.metrics.entities import ENTITIES, TOKEN_ACCURACY, Span, spans
from secateur.select import Unit
from secateur.tasks import Options, find, read_table
from secateur.tasks.base.batches import OwnLabels
from secateur.tasks.find import task_of_config
from secateur.tasks.token_classification import TokenClassification
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model, open_module
from secateur.training.fine_tune import fine_tune
from tests.tasks import word_models
from tests.tasks.word_models import TAGS, tagged, write_lines

ROWS = [
    {"tokens": ["ann", "smiths", "left", "oslo"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["the", "books"], "tags": ["O", "O"]},
]


def tagger(**options):
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: i for i, tag in enumerate(TAGS)}}
    return word_models.bert("BertForTokenClassification", **{**names, **options})


def task_of(model=None, tokenizer=None, **options):
    return find(model or tagger(), tokenizer or word_models.word_pieces(), options=Options(**options))


@pytest.fixture(scope="module")
def trained():
    """A tagger that knows the rule of `tagged`, and its mean loss in training."""
    model = tagger()
    task = task_of(model)
    examples = task.encode(as_table(list(tagged(200))))
    loss = fine_tune(
        TorchHost.untraced(model), task, examples, epochs=6, learning_rate=3e-3, batch_size=16, progress=False
    )
    return model, loss


# -- spans and metrics ------------------------------------------------------------------------------------------------

SPANS = {
    "IOB2": ("B-PER I-PER B-PER O B-LOC", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5)]),
    "IOB1: B only between neighbours": ("I-PER I-PER B-PER O I-LOC", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5)]),
    "BIOES": ("B-PER I-PER E-PER S-LOC S-LOC", [("PER", 0, 3), ("LOC", 3, 4), ("LOC", 4, 5)]),
    "BILOU": ("B-PER L-PER U-LOC O", [("PER", 0, 2), ("LOC", 2, 3)]),
    "types alone": ("PER PER O LOC PER", [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]),
    "letters alone": ("B I O I B", [("", 0, 2), ("", 3, 4), ("", 4, 5)]),
    "the type changes inside": ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
    "goes on after its end": ("B-PER E-PER I-PER", [("PER", 0, 2), ("PER", 2, 3)]),
    "nothing": ("O O", []),
}


@pytest.mark.parametrize("name", SPANS)
def test_spans(name):
    tags, wanted = SPANS[name]
    assert spans(tags.split()) == [Span(*span) for span in wanted]


def test_metrics_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"], ["O"]]
    own = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "B-PER"], ["O"]]
    # row 0: LOC right, PER too short; row 1: one right, one too many; row 2: none on either side
    tables = {metric.name: metric.rows(own, gold) for metric in ENTITIES}
    np.testing.assert_array_equal(tables["entity F1"], [[1, 2, 2], [1, 2, 1], [0, 0, 0]])
    values = {metric.name: metric.whole(tables[metric.name]) for metric in ENTITIES}
    assert values == pytest.approx(
        {"entity F1": 2 * 2 / (4 + 3), "precision": 2 / 4, "recall": 2 / 3, "token accuracy": 5 / 7}
    )


def test_metrics_without_entities():
    f1, precision, recall, _ = ENTITIES
    assert [m.whole(m.rows([["O"]], [["O"]])) for m in (f1, precision, recall)] == [1, 1, 1]
    assert [m.whole(m.rows([["B-X"]], [["O"]])) for m in (f1, precision, recall)] == [0, 0, 0]
    assert [m.whole(m.rows([["O"]], [["B-X"]])) for m in (f1, precision, recall)] == [0, 0, 0]


# -- rows to batches --------------------------------------------------------------------------------------------------


def test_found_from_the_config(tmp_path):
    word_models.write_tagger(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert task_of_config(config) is TokenClassification


def test_the_first_token_of_a_word_carries_its_tag():
    task = task_of()
    batch = task.collate(task.encode(as_table(ROWS)).features)
    # [CLS] ann smith ##s left oslo [SEP] / [CLS] the books [SEP] and padding
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 0, 1, -100], [-100, 0, 0, -100, -100, -100, -100]]
    assert torch.equal(batch["_starts"], batch["labels"] != -100)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 7)
    wide = task.collate(task.encode(as_table(ROWS)).features, pad_to=12)
    assert {tensor.shape for tensor in wide.values()} == {(2, 12)}


def test_padding_on_the_left():
    tokenizer = word_models.word_pieces()
    tokenizer.padding_side = "left"
    task = task_of(tokenizer=tokenizer)
    batch = task.collate(task.encode(as_table(ROWS)).features)
    assert batch["labels"].tolist()[1] == [-100, -100, -100, -100, 0, 0, -100]
    assert torch.equal(batch["_starts"], batch["labels"] != -100)


FORMS = {
    "texts": {"text": ["ann smiths left oslo", "the books"], "tags": ["B-PER I-PER O B-LOC", "O O"]},
    "numbers of the head": {"tokens": [r["tokens"] for r in ROWS], "labels": [[2, 3, 0, 1], [0, 0]]},
    "numbers as text": {"words": ["ann smiths left oslo", "the books"], "pos_tags": ["2 3 0 1", "0 0"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form):
    examples = task_of().encode(as_table(FORMS[form]))
    assert examples.references == [row["tags"] for row in ROWS]
    assert examples.features[0]["labels"] == [-100, 2, 3, -100, 0, 1, -100]


def test_a_datasets_folder_with_class_names(tmp_path):
    order = ["O", "B-PER", "I-PER", "B-LOC"]  # another order than that of the head
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=order))}
    )
    columns = {"tokens": [r["tokens"] for r in ROWS], "ner_tags": [[order.index(t) for t in r["tags"]] for r in ROWS]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "data")
    table = read_table(tmp_path / "data")
    assert task_of().encode(table).references == [row["tags"] for row in ROWS]
    assert TokenClassification.new_head(table, Options())["id2label"] == dict(enumerate(order))


def test_a_head_without_names_takes_those_of_the_data():
    task = task_of(word_models.bert("BertForTokenClassification", num_labels=4))
    assert task.encode(as_table(ROWS)).references == [row["tags"] for row in ROWS]
    assert task.config.id2label == dict(enumerate(TAGS))
    assert any("alphabet, O first: O, B-LOC, B-PER, I-PER" in note for note in task.notes)


def test_a_new_head_has_the_tags_of_the_data():
    assert TokenClassification.new_head(as_table(ROWS), Options())["id2label"] == dict(enumerate(TAGS))
    numbered = as_table([{"tokens": "a b c", "tags": [10, 2, 0]}])
    assert TokenClassification.new_head(numbered, Options())["id2label"] == {0: "0", 1: "2", 2: "10"}
    with pytest.raises(DataError, match="--label-column"):
        TokenClassification.new_head(as_table([{"tokens": ["a"]}]), Options())


def test_words_that_are_cut_off():
    task = task_of(max_length=5)  # [CLS] ann smith ##s [SEP]
    examples = task.encode(as_table(ROWS))
    (note,) = task.notes
    assert note.startswith("words that --max-length 5 cuts off, or that give no token: 2;")
    prediction = task.predict([np.array([[2.0, 0.9], [3.0, 0.8]])], examples.features[:1])
    assert prediction == ["B-PER", "I-PER", "O", "O"]
    assert prediction.probabilities == pytest.approx([0.9, 0.8, 0, 0])
    task.encode(as_table(ROWS))
    assert [n.split(": ")[1] for n in task.notes] == ["4; their tag is taken to be O"]


BAD = {
    "a tag outside the head": (["ann"], ["B-ORG"], "line 2: label 'B-ORG' is no class of the model; it knows O, B-LOC"),
    "a number outside the head": (["ann"], [7], "line 2: label 7 is outside the 4 classes"),
    "fewer tags than words": (["ann", "left"], ["O"], "line 2: 1 tags in column 'tags' for 2 words"),
    "no words": ([], [], "line 2: column 'tokens' is empty"),
    "blanks": ("  ", "O", "line 2: column 'tokens' is empty"),
    "nothing": (None, ["O"], "line 2: column 'tokens' is empty"),
    "no list": (7, ["O"], "line 2: 7 in column 'tokens' is no list and no text"),
    "a list in a list": ([["ann"]], ["O"], "line 2: ['ann'] in the list of column 'tokens' is no word"),
    "an empty tag": (["ann"], [""], "line 2: column 'tags' is empty"),
    "no tag": (["ann"], None, "line 2: column 'tags' is empty"),
    "a word without tokens": ([" "], ["O"], "line 2: no word of column 'tokens' gives a token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, tmp_path):
    tokens, tags, sentence = BAD[case]
    path = write_lines(tmp_path / "bad.jsonl", [ROWS[0], {"tokens": tokens, "tags": tags}])
    with pytest.raises(DataError) as caught:
        task_of().encode(read_table(path))
    assert sentence in str(caught.value)
    assert "bad.jsonl" in str(caught.value)


def test_other_columns_and_tokenizers():
    with pytest.raises(DataError, match="no column tokens or words or text or sentence; name the text with --text-col"):
        task_of().encode(as_table({"body": ["ann"]}))
    with pytest.raises(DataError, match="--text-column names 2 columns; this task reads one"):
        task_of(columns={"text": "tokens,tags"}).encode(as_table(ROWS))
    with pytest.raises(ModelError, match="a ByT5Tokenizer does not tell; save a fast tokenizer"):
        task_of(tokenizer=transformers.ByT5Tokenizer()).encode(as_table(ROWS))


def test_byte_level_words_are_read_as_in_a_text():
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "<pad>", "Ġa", "Ġb"])}, [("Ġ", "a"), ("Ġ", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
    task = task_of(tagger(vocab_size=300), tokenizer)
    (feature,) = task.encode(as_table({"tokens": [["a", "b", "ab"]]})).features
    assert feature["input_ids"] == tokenizer("a b ab")["input_ids"]
    assert feature["_starts"] == [0, 1, 2]


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_training_and_evaluation(trained):
    model, loss = trained
    assert loss < 0.8  # it begins at ln 4 = 1.39
    task = task_of(model)
    batches = task.batches(list(tagged(40, seed=1)), batch_size=8)
    result = task.evaluate(model, batches)
    wanted = by_hand(model, list(tagged(40, seed=1)))
    assert [list(p) for p in result.predictions] == wanted
    assert result.values["entity F1"] > 0.9
    assert result.metric == "entity F1"
    assert not result.is_against_dense


def by_hand(model, rows):
    """The tags of rows, each run alone and read without the task."""
    tokenizer = word_models.word_pieces()
    found = []
    for row in rows:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = model(**encoded).logits[0].argmax(-1).tolist()
        owners = encoded.word_ids()
        found.append([TAGS[best[owners.index(i)]] for i in range(len(row["tokens"]))])
    return found


def test_data_without_tags(trained):
    model, _ = trained
    task = task_of(model)
    rows = [{"tokens": row["tokens"]} for row in tagged(20, seed=2)]
    batches = task.batches(rows, batch_size=8)
    same = task.evaluate(model, batches, model)
    assert same.values == {"entity F1": 1, "precision": 1, "recall": 1, "token accuracy": 1}
    assert (same.kl, same.flips, same.loss) == (0, 0, None)
    other = task.evaluate(tagger(seed=1), batches, model)
    assert other.kl > 0.1
    assert other.flips > 0.5
    assert other.is_against_dense
    with pytest.raises(DataError, match="no labels"):
        task.evaluate(model, batches)


def test_divergence_counts_the_first_token_of_words_alone(trained):
    model, _ = trained
    task, other = task_of(model), tagger(seed=1)
    batch = task.batches([{"tokens": ROWS[0]["tokens"]}])[0]
    inputs = {name: value for name, value in batch.items() if not name.startswith("_")}
    with torch.no_grad():
        dense, own = model(**inputs), other(**inputs)
    p, q = (output.logits[0, [1, 2, 4, 5]].log_softmax(-1) for output in (dense, own))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    assert float(task.divergence(own, dense, batch)) == pytest.approx(float(wanted), rel=1e-5)


def test_own_labels_give_a_loss(trained):
    model, _ = trained
    task = task_of(model)
    batches = task.batches([{"tokens": row["tokens"]} for row in ROWS])
    (batch,) = OwnLabels(task, batches, model)
    assert torch.equal(batch["labels"] != -100, batch["_starts"])
    assert bool(task.loss(model, batch).isfinite())


def test_an_answer_for_a_person(trained):
    model, _ = trained
    task = task_of(model)
    result = task.evaluate(model, task.batches(ROWS[:1]))
    shown = task.shown(result.predictions[0], ())
    entities = json.loads(json.dumps(shown))["entities"]
    assert [(e["type"], e["text"], e["start"], e["end"]) for e in entities] == [
        ("PER", "ann smiths", 0, 2),
        ("LOC", "oslo", 3, 4),
    ]
    assert all(0.5 < e["probability"] <= 1 for e in entities)


def test_tags_that_mark_no_entities():
    names = ["NOUN", "VERB"]
    task = task_of(tagger(id2label=dict(enumerate(names)), label2id={"NOUN": 0, "VERB": 1}))
    result = task.evaluate(task.model, task.batches([{"tokens": "ann left", "pos_tags": "NOUN VERB"}]))
    assert task.metrics(has_references=True) == (TOKEN_ACCURACY,)
    assert [word for word, _ in task.shown(result.predictions[0], ())["tags"]] == ["ann", "left"]


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_labelled", [True, False], ids=["labels", "no labels"])
def test_prune_and_reload(trained, tmp_path, is_labelled):
    model, _ = trained
    rows = list(tagged(60, seed=3))
    table = as_table(rows if is_labelled else [{"tokens": row["tokens"]} for row in rows])
    task = task_of(model)
    material = prepare(task, table, None, calibration_samples=32, batch_size=8, seed=0)
    stage = Stage(criteria.taylor, Unit("ffn"), Uniform(0.25))
    tuning = Tuning(epochs=1, distil=True, learning_rate=1e-3)
    outcome = run("small", open_module(model), [stage], material, tuning, tmp_path / "small")
    assert outcome.dense.is_against_dense != is_labelled
    assert outcome.pruned.value > 0.8
    assert outcome.difference < 1e-5
    assert outcome.reload_difference == 0
    again = load_model(tmp_path / "small")
    assert again.config.id2label == dict(enumerate(TAGS))
    assert again.bert.encoder.layer[0].intermediate.dense.weight.shape == (48, 32)


def test_an_encoder_gets_a_head_for_the_tags(tmp_path):
    word_models.write_model(tmp_path, "BertModel")
    new = []
    task = open_to_train(str(tmp_path), "token-classification", as_table(ROWS), Options(), new_head=new.extend)
    assert new == ["classifier.bias", "classifier.weight"]
    assert task.config.id2label == dict(enumerate(TAGS))
