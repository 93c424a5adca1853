"""secateur run: a classifier and a decoder answer through the kernels as they do without."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from secateur.cli.run import words
from secateur.data.columns import Column
from secateur.errors import DataError
from secateur.tasks.base.inputs import of_arguments
from tests import zoo

TEXTS = ["the film was good great", "the plot was awful poor"]


@pytest.fixture
def pruned(copy):
    """The classifier with 80% of each linear weight gone, saved anew."""
    zoo.pruned(transformers.AutoModelForSequenceClassification.from_pretrained(copy)).save_pretrained(copy)
    return copy


@pytest.fixture
def decoder(encoder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path / "decoder")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    special = {"bos_token_id": None, "eos_token_id": None}
    model = zoo.llama(**sizes, **special, vocab_size=len(tokenizer), max_position_embeddings=2048)
    zoo.pruned(model).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def test_a_classifier_answers_as_in_torch(result, call, pruned):
    done = result("run", pruned, *TEXTS, "--no-measure", "--max-length", "16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pruned)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pruned).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    assert [a["label"] for a in done["answers"]] == [model.config.id2label[int(i)] for i in logits.argmax(-1)]
    expected = logits.softmax(-1).max(-1).values.tolist()
    assert [a["probability"] for a in done["answers"]] == pytest.approx(expected, abs=1e-4)
    assert "linear layers" in done["summary"]
    assert "blocks run as one call" in done["summary"]
    assert [a["input"] for a in done["answers"]] == TEXTS
    assert all(a["ms"] > 0 for a in done["answers"])
    shown = call("run", pruned, *TEXTS, "--no-measure", "--max-length", "16")
    answer = done["answers"][1]
    assert shown.out.splitlines()[1] == f"{answer['label']}\t{answer['probability']:.3f}\t{TEXTS[1]}"
    assert done["summary"] in shown.err


def test_a_model_that_cannot_be_traced_runs_layer_by_layer_and_says_so(result, pruned, monkeypatch):
    from secateur.errors import ModelError
    from secateur.runtime import compile_model

    def fail(*args):
        raise ModelError("no trace today")

    monkeypatch.setattr(compile_model, "Traced", fail)
    done = result("run", pruned, *TEXTS, "--no-measure", "--max-length", "16")
    assert done["summary"].endswith("Nothing was fused: no trace today")
    assert len(done["answers"]) == len(TEXTS)


def test_a_file_gives_the_same_answers_as_arguments(result, pruned, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    options = ("--no-measure", "--max-length", "16")
    from_file = result("run", pruned, "--data", path, *options)["answers"]
    assert [a["label"] for a in from_file] == [a["label"] for a in result("run", pruned, *TEXTS, *options)["answers"]]


def test_a_decoder_goes_on(result, call, decoder):
    done = result("run", decoder, "the film", "--no-measure", "--new-tokens", "5", "--max-length", "16")
    answer = done["answers"][0]
    assert "At 16 tokens: " in done["summary"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder).eval()
    ids = tokenizer(["the film"], return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert answer["generated"] == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert call("run", decoder, "the film", "--no-measure", "--new-tokens", "5").out.startswith("the film")


def test_texts_that_do_not_fit_the_model(refused, pruned, decoder):
    long = "film " * 60
    sentence = refused("run", pruned, "a film", long, "--no-measure")
    assert sentence == "a text has 62 tokens, the model 32 positions; pass --max-length 32"
    for model in (pruned, decoder):
        config = transformers.AutoConfig.from_pretrained(model)
        config.max_position_embeddings = 32
        config.save_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer._tokenizer.post_processor = None
        tokenizer.save_pretrained(model)
        assert "row 0 gives no token: ' '; remove it" in refused("run", model, " ", "--no-measure")
        assert "the arguments, number 2: column 'text' is empty" in refused("run", model, "a", "", "--no-measure")
    sentence = refused("run", decoder, "the film", "--new-tokens", 40, "--no-measure")
    assert "a text of 2 tokens and 40 new ones exceed the 32 positions of the model" in sentence


def test_a_compiled_folder_answers_as_the_model_that_was_saved(result, refused, pruned):
    from secateur import runtime
    from secateur.torch.open import load_model

    runtime.save(runtime.compile(load_model(pruned), measure=False), pruned.parent / "compiled")
    for file in pruned.glob("tokenizer*"):
        shutil.copy(file, pruned.parent / "compiled")
    options = ("--max-length", "16", "--batch-size", "2")
    packed, answers = (result("run", pruned.parent / "compiled", *TEXTS, *options)["answers"] for _ in range(2))
    answers = result("run", pruned, *TEXTS, *options, "--no-measure")["answers"]
    assert [a["label"] for a in packed] == [a["label"] for a in answers]
    assert [a["probability"] for a in packed] == pytest.approx([a["probability"] for a in answers], abs=1e-4)
    sentence = refused("run", pruned.parent / "compiled", "a", "--value", "int8")
    assert sentence.startswith("--value has no meaning in running a compiled model, which stays as it was packed")


def test_pairs_and_labels_in_a_file(call, pruned, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"premise": "the film was good", "hypothesis": "a fine film", "label": "no class of the model"}\n')
    done = call("run", pruned, "--data", path, "--no-measure", "--max-length", "16", "--json")
    assert "the column premise and hypothesis is taken as text (--text-column names another)" in done.err
    assert "no class of the model" not in done.err
    (answer,) = json.loads(done.out)["answers"]
    assert answer["input"] == "the film was good | a fine film"
    assert answer["label"] in ("neg", "pos")


READER = (Column("text", "--text-column", ("question,context",)), Column("label", "--l", ("x",), is_needed=False))


def test_arguments_become_rows():
    table, named = of_arguments(READER, ["who?", "I", "when?", "now"])
    assert named == {"text": "question,context"}
    assert dict(table.columns) == {"question": ["who?", "when?"], "context": ["I", "now"]}
    assert table.where(1) == "the arguments, number 2"
    with pytest.raises(DataError, match="reads question and context, and 3 arguments are not as many of each"):
        of_arguments(READER, ["who?", "I", "when?"])
    image = Column("image", "--image-column", ("img", "image"))
    table, named = of_arguments((image,), ["a.png", "b.png"])
    assert dict(table.columns) == {"image": ["a.png", "b.png"]}
    assert named == {"image": "image"}


def test_answers_in_words():
    entity = {"type": "LOC", "text": "Rome", "start": 3, "end": 4, "probability": 0.91234}
    for value, text in [
        ("pos", "pos"),
        (0.98765, "0.988"),
        ({"a": 0.5, "b": 0.75}, "a 0.500, b 0.750"),
        ({}, "none"),
        ([entity, entity], "LOC Rome 0.912; LOC Rome 0.912"),
        ([["Rome", "LOC"], ["is", "O"]], "Rome LOC; is O"),
        ([], "none"),
        ([0.5, -1.25], "0.5000 -1.2500"),
        (None, "-"),
    ]:
        assert words(value) == text


def test_what_cannot_be_run_is_said(refused, pruned, tmp_path):
    assert "no text" in refused("run", pruned)
    assert "not both" in refused("run", pruned, "a", "--data", tmp_path / "texts.csv")
    assert "--value int3" in refused("run", pruned, "a", "--value", "int3")
    assert "goes with value='int8'" in refused("run", pruned, "a", "--activations", "int8")
    assert "no task 'poetry'; there is text-classification" in refused("run", pruned, "a", "--task", "poetry")
