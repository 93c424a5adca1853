"""Records that commands leave in a model's folder, and the page of --report that is made of them."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from secateur.record import NAME, read_record
from tests.text_models import sentences, write_classifier, write_csv, write_documents, write_model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", sentences(80, (0, 1)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A random classifier that answers half of the rows with the one, half with the other class."""
    folder = write_classifier(tmp_path_factory.mktemp("model") / "dense")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    batch = words(
        [text for text, _ in sentences(80)], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model.eval()(**batch).logits
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def page(monkeypatch):
    """The records that a page was made of; the page itself has tests of its own."""
    shown = []

    def write_report(records, path, *, overwrite=False):
        shown.extend(records)
        path.write_text("page")
        return path

    monkeypatch.setattr("secateur.report.page.write_report", write_report)
    return shown


UNITS = ("--criterion", "magnitude", "--pattern", "ffn", "--sparsity", 0.75, "--max-length", 16)


@pytest.fixture(scope="module")
def kept():
    """What `small` has made, once for all tests."""
    return {}


@pytest.fixture
def small(result, dense, rows, page, kept):
    """What `prune --report` says, the folder that it writes, and the records that its page shows."""
    if not kept:
        place = dense.parent
        told = result(
            "prune", dense, "--data", rows, *UNITS, "--output", place / "small", "--report", place / "report.html"
        )
        kept.update(told=told, folder=place / "small", shown=list(page))
        page.clear()
    return SimpleNamespace(**kept)


def test_a_pruned_folder_has_a_record_of_what_was_measured_and_no_row_of_the_data(call, small):
    outcome, folder = small.told, small.folder
    record = read_record(folder)
    quality = record.quality
    assert (quality.metric, quality.rows) == (outcome["metric"], outcome["rows"]) == ("accuracy", 8)
    assert (quality.dense, quality.pruned, quality.drop) == (outcome["dense"], outcome["pruned"], outcome["drop"])
    assert quality.interval == outcome["drop_interval"]
    assert quality.divergence == outcome["stages"]["pruned"]["kl"] > 0
    assert [(s.name, s.value) for s in record.stages] == [("dense", quality.dense), ("pruned", quality.pruned)]
    assert (record.sizes.parameters, record.sizes.nonzero) == (outcome["total"], outcome["nonzero"])
    assert record.sizes.macs_share == pytest.approx(outcome["macs_ratio"])
    assert record.sizes.bytes < record.sizes.dense_bytes
    ffn = [(one.block, one.kept, one.total) for one in record.units if one.kind == "ffn"]
    assert ffn == [(0, 16, 64), (1, 16, 64)]
    wide = next(one for one in record.matrices if one.name.endswith("layer.1.intermediate.dense.weight"))
    assert (wide.block, wide.shape, wide.dense_shape, wide.density) == (1, [16, 32], [64, 32], 1.0)
    assert [(file.role, file.name, file.rows) for file in record.provenance.data] == [
        ("training", "rows.csv", 72),
        ("test", "rows.csv", 8),
    ]
    assert (record.model_type, record.task, record.title) == ("bert", "text-classification", "small")
    assert call("inspect", folder, "--check").code == 0
    assert NAME in json.loads((folder / "secateur-hashes.json").read_text())["sha256"]
    texts = [text for text, _ in sentences(80)]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not any(text.encode() in content for text in texts), file.name
    (shown,) = small.shown
    assert shown.model_copy(update={"examples": []}) == record
    assert all(example.shown in texts for example in shown.examples)
    assert (folder.parent / "report.html").read_text() == "page"


def test_an_evaluation_shows_rows_on_which_the_models_disagree_the_farthest_first(
    result, call, dense, small, rows, tmp_path, page
):
    folder = small.folder
    words = ["eval", folder, "--data", rows, "--max-length", 16]
    told = result(*words, "--against", dense, "--report", tmp_path / "a.html")
    (shown,) = page
    own = read_record(folder)
    assert (shown.units, shown.sizes, shown.provenance) == (own.units, own.sizes, own.provenance)
    assert shown.quality.rows == 80
    assert (shown.quality.drop, shown.quality.flips) == (told["drop"], told["flips"])
    assert len(shown.examples) == min(12, round(80 * told["flips"])) > 1
    labels = dict(sentences(80, ("LABEL_0", "LABEL_1")))
    for example in shown.examples:
        assert (example.kind, example.expected) == ("text", labels[example.shown])
        assert {example.dense, example.pruned} == {"LABEL_0", "LABEL_1"}
    far = [example.divergence for example in shown.examples]
    assert far == sorted(far, reverse=True)
    exists = call(*words, "--report", tmp_path / "a.html")
    assert (exists.code, "a.html exists; choose another output or pass --overwrite" in exists.err) == (2, True)
    page.clear()
    assert call(*words, "--report", tmp_path / "a.html", "--overwrite").code == 0
    assert [(stage.name, stage.value) for stage in page[0].stages] == [("this model", told["values"]["accuracy"])]


def test_models_that_are_timed_are_shown_side_by_side_with_their_own_records(result, dense, small, tmp_path, page):
    folder = small.folder
    sizes = ["--runtime", "torch", "--batch", 1, "--length", 8, "--turns", 2]
    told = result("bench", dense, folder, *sizes, "--report", tmp_path / "page.html")
    first, second = page
    times = {row["model"]: row for row in told["rows"]}
    (slow,), (fast,) = first.speeds, second.speeds
    assert (first.title, slow.ms, slow.dense_ms) == ("dense", times["dense"]["median_ms"], None)
    assert (second.title, fast.ms, fast.dense_ms) == ("small", times["small"]["median_ms"], slow.ms)
    assert (fast.runtime, fast.batch, fast.length, fast.threads) == ("torch", 1, 8, 1)
    assert (second.quality, first.quality) == (read_record(folder).quality, None)


def test_a_schedule_of_tokens_has_a_record_with_and_without_data(result, dense, rows, tmp_path, page):
    result("prune", dense, "--tokens", "mid", "--output", tmp_path / "a", "--report", tmp_path / "a" / "page.html")
    record = read_record(tmp_path / "a")
    assert (record.quality, [one.what for one in record.asked]) == (None, ["tokens"])
    assert page == [record]
    told = result("prune", dense, "--tokens", "mid", "--data", rows, "--output", tmp_path / "b")
    assert read_record(tmp_path / "b").quality.drop == told["drop"]


def test_a_language_model_has_a_record_with_the_error_of_each_block(result, tmp_path, page):
    write_model(tmp_path / "llm")
    text = write_documents(tmp_path / "text.txt")
    sizes = ["--samples", 4, "--context", 16, "--pattern", "2:4"]
    place = ["--output", tmp_path / "out", "--report", tmp_path / "page.html"]
    told = result("prune", tmp_path / "llm", "--calibration", text, *sizes, *place)
    record = read_record(tmp_path / "out")
    assert page == [record]
    (curve,) = record.curves
    assert curve.points == [[number, block["error"]] for number, block in enumerate(told["blocks"])]
    assert record.sizes.dense_parameters - record.sizes.nonzero == told["zeros"]
    assert {(one.block, one.density) for one in record.matrices} == {(block, 0.5) for block in range(3)}
    assert [(file.role, file.name) for file in record.provenance.data] == [("calibration", "text.txt")]
    score = result(
        *("eval", tmp_path / "out", "--task", "perplexity", "--text", text, "--context", 16, "--samples", 4),
        *("--against", tmp_path / "llm", "--report", tmp_path / "eval.html"),
    )
    assert page[-1].quality.drop == score["delta"]
    assert [(form.name, form.drop) for form in page[-1].forms] == [(r["name"], r["delta"]) for r in score["rows"]]
    assert page[-1].matrices == record.matrices
