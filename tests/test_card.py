"""Model cards: what a hub reads of them, text that stays text, and what people add to them stays."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from secateur.card.facts import Facts, facts_of
from secateur.card.front_matter import read_front_matter, split
from secateur.card.loading import auto_class, loading
from secateur.card.page import card, is_hub_id
from secateur.card.write import BEGIN, END, NAME, write_card
from secateur.errors import ModelError
from secateur.record import write_record
from secateur.schemas.record import DataFile, Provenance, Quality, Record, Speed, Units
from secateur.schemas.results import Machine

RECORD = Record(
    title="small",
    task="text-classification",
    quality=Quality(metric="macro F1", dense=0.8, pruned=0.79, drop=0.01, interval=[-0.01, 0.03], rows=100),
    speeds=[Speed(runtime="onnx", batch=1, length=128, threads=2, ms=5.0, dense_ms=10.0, low_ms=4.9, high_ms=5.2)],
    units=[
        *(Units(axis=f"L{i}.head", kind="head", block=i, kept=6 + i // 2, total=12) for i in range(4)),
        Units(axis="hidden", kind="hidden", kept=64, total=64),
    ],
    provenance=Provenance(
        command="secateur prune big --output small",
        data=[DataFile(role="test", name="reviews.csv", rows=100, sha256="0" * 64)],
        machine=Machine(processor="a processor", cores=2),
    ),
)
ORIGIN = {"license": "mit", "base_model": "acme/big", "language": ["en"]}
HOSTILE = "x\n---\nlicense: stolen <script>alert(1)</script> [a](http://b) | `c` ``` <!-- secateur: end mark"


def test_the_hub_reads_metrics_task_licence_and_base_model():
    read = ModelCard(card(RECORD, Facts(architecture="BertForSequenceClassification"), ORIGIN)).data
    (result,) = read.eval_results
    assert (read.library_name, read.pipeline_tag, read.license) == ("transformers", "text-classification", "mit")
    assert (read.base_model, read.language, read.tags) == ("acme/big", ["en"], ["secateur", "pruning"])
    assert read.model_name == "small"
    assert (result.task_type, result.dataset_name, result.dataset_type) == (
        "text-classification",
        "reviews.csv",
        "reviews_csv",
    )
    assert (result.metric_type, result.metric_value, result.metric_name) == ("macro_f1", 0.79, "macro F1")
    assert read.to_dict() == yaml.safe_load(read.to_yaml())


def test_people_read_quality_speed_and_what_is_left():
    text = card(RECORD, Facts(), ORIGIN)
    for part in (
        "| macro F1 | 0.8 | 0.79 |",
        "the drop is 0.01 (95% interval -0.01 to 0.03)",
        "| onnx | forward | 1 x 128 | 2 | 10 | 5 (4.9 to 5.2) | 2.00 |",
        "a processor, 2 cores",
        "| 0 to 1 | 6 of 12 |\n| 2 to 3 | 7 of 12 |",
        "secateur prune big --output small",
        "[acme/big](https://huggingface.co/acme/big)",
    ):
        assert part in text, part


def test_nothing_is_claimed_that_is_not_known():
    text = card(Record(title="small"), Facts())
    assert split(text)[0] == {"library_name": "transformers", "tags": ["secateur"]}
    against = RECORD.model_copy(update={"quality": RECORD.quality.model_copy(update={"is_against_dense": True})})
    assert "model-index" not in split(card(against, Facts()))[0]
    whole = Record(title="small", units=[Units(axis="hidden", kind="hidden", kept=64, total=64)])
    assert "64" not in card(whole, Facts())
    assert split(card(whole, Facts()))[0]["tags"] == ["secateur"]
    assert "the dense model's answers take their place" in card(against, Facts())


@pytest.mark.parametrize("base", ["/home/me/big", "a/b/c", "a b/c", "org/../x", ["acme/big", "a b"], 7, ""])
def test_a_base_model_that_is_no_hub_id_is_left_out(base):
    assert "base_model" not in split(card(RECORD, Facts(), {"base_model": base}))[0]
    assert is_hub_id("acme/big-2.0_b")
    assert not is_hub_id(base)


def test_strings_of_users_stay_strings():
    made = Provenance(command=HOSTILE, date=HOSTILE, data=[DataFile(role="test", name=HOSTILE, sha256=HOSTILE)])
    record = RECORD.model_copy(
        update={
            "title": HOSTILE,
            "reading": HOSTILE,
            "notes": [HOSTILE],
            "units": [Units(axis=HOSTILE, kind=HOSTILE, kept=1, total=2)],
            "provenance": made,
            "quality": RECORD.quality.model_copy(update={"metric": HOSTILE}),
        }
    )
    text = card(record, Facts(steps=({"criterion": HOSTILE},), model_type=HOSTILE))
    front, body = split(text)
    assert "license" not in front
    assert ModelCard(text).data.license is None
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == " ".join(HOSTILE.split())
    assert ModelCard(text).data.eval_results[0].dataset_name == " ".join(HOSTILE.split())
    outside = "".join(body.split("````")[::2])  # the block of code has longer marks than the text in it
    shown = re.sub(r"(?<!\\)`[^`]*`", "", outside.replace("```", ""))
    assert "&lt;script&gt;" in shown
    for markup in ("<script>", "<!--", "[a](", "\n---\n"):
        assert markup not in shown, markup
    assert "<!--" not in body


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def test_what_people_add_to_a_card_stays(folder):
    write_card(RECORD, folder, ORIGIN)
    path = folder / NAME
    assert read_front_matter(path)["license"] == "mit"
    text = path.read_text().replace("tags:", "datasets:\n- imdb\ntags:\n- reviews")
    path.write_text(text.replace(BEGIN, f"My words.\n\n{BEGIN}") + "\nMore words.\n")
    write_record(RECORD.model_copy(update={"title": "smaller", "units": []}), folder)
    front, body = split(path.read_text())
    assert body.startswith("\nMy words.\n\n<!--")
    assert body.endswith("More words.\n")
    assert body.count(BEGIN) == body.count(END) == 1
    assert "# smaller" in body
    assert "7 of 12" not in body
    assert (front["datasets"], front["license"]) == (["imdb"], "mit")
    assert front["tags"] == ["secateur", "reviews", "pruning"]
    before = path.read_text()
    write_record(RECORD.model_copy(update={"title": "smaller", "units": []}), folder)
    assert path.read_text() == before


def test_a_card_of_somebody_else_stays_as_it_is(folder):
    (folder / NAME).write_text("# Mine\n")
    write_record(RECORD, folder)
    assert (folder / NAME).read_text() == "# Mine\n"


def test_a_picture_is_shown_where_there_is_one(folder):
    write_card(RECORD, folder)
    assert "![" not in (folder / NAME).read_text()
    (folder / "frontier.png").write_bytes(b"")
    write_card(RECORD, folder)
    assert "](frontier.png)" in (folder / NAME).read_text()


def test_a_folder_of_another_kind_gets_no_card(tmp_path):
    write_record(RECORD, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_damaged_plan_is_said(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"format": 1, "keep": 3, "masks": {}}))
    with pytest.raises(ModelError, match="plan.json is damaged: keep is 3"):
        facts_of(tmp_path)


@pytest.mark.parametrize(
    ("task", "architecture", "expected"),
    [
        ("text-classification", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("automatic-speech-recognition", "Wav2Vec2ForCTC", "AutoModelForCTC"),
        ("automatic-speech-recognition", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("text-generation", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("feature-extraction", "T5EncoderModel", "T5EncoderModel"),
        (None, "LlamaForCausalLM", "AutoModelForCausalLM"),
        (None, "GPT2LMHeadModel", "GPT2LMHeadModel"),
        (None, None, "AutoModel"),
    ],
)
def test_the_class_that_opens_a_model(task, architecture, expected):
    assert auto_class(task, Facts(architecture=architecture)) == expected


def test_a_sentence_encoder_is_opened_as_one():
    text = card(Record(title="small", task="feature-extraction"), Facts(is_sentence=True))
    front = split(text)[0]
    assert (front["library_name"], front["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert 'SentenceTransformer(".")' in loading(None, Facts(is_sentence=True))
