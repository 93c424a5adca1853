"""Schedules of tokens from the command line: alone, after other pruning, shown, run and exported, or one sentence."""

import numpy as np
import pytest

from secateur.torch.open import load_model
from secateur.torch.tokens.install import tokens_of
from tests.text_models import write_classifier, write_csv

KEEP = "60,30"


def schedule(folder):
    return tokens_of(load_model(folder)).schedule


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random classifier with a tokenizer."""
    return write_classifier(tmp_path_factory.mktemp("small") / "small", layers=3)


@pytest.fixture
def short(call, small, tmp_path):
    """The classifier with a schedule, which needs no data."""
    done = call("prune", small, "--keep", KEEP, "--output", tmp_path / "short")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "short keeps 60, 30, 30 % of the tokens after blocks 1 to 3, and the pooled token alone" in said
    assert "no data was given, so nothing was measured" in said
    return tmp_path / "short"


def test_alone_without_data_and_shown_again(result, short, small):
    assert schedule(short).keep == (60, 30, 30)
    assert (short / "tokenizer.json").is_file()
    shown = result("inspect", short)
    assert shown["tokens"] == {"keep": [60, 30, 30], "method": "prune", "pooled": True}
    whole = result("inspect", small)
    assert whole["tokens"] is None
    assert (whole["macs"], whole["axes"]) == (shown["macs"], shown["axes"])


def test_alone_with_data_the_drop_is_measured(result, small, data, tmp_path):
    done = result("prune", small, "--tokens", "fast", "--data", data, "--output", tmp_path / "short")
    assert (done["stages"]["dense"]["rows"], done["stages"]["tokens"]["rows"]) == (240, 240)
    assert done["stages"]["tokens"]["kl"] > 0
    assert done["drop"] == pytest.approx(done["dense"] - done["pruned"])
    assert done["tokens"] == schedule(tmp_path / "short").to_json()
    assert done["token_work"] == schedule(tmp_path / "short").work()
    assert done["reload_difference"] == 0
    again = result("eval", tmp_path / "short", "--data", data, "--against", small)
    assert again["kl"] == pytest.approx(done["stages"]["tokens"]["kl"], rel=1e-5)


def test_units_go_and_training_comes_before_the_schedule(result, small, data, tmp_path):
    units = ["--criterion", "taylor", "--pattern", "head,ffn", "--sparsity", 0.5, "--fine-tune", 1]
    place = ["--data", data, "--output", tmp_path / "short"]
    done = result("prune", small, *units, "--keep", KEEP, *place)
    assert list(done["stages"]) == ["dense", "pruned", "tuned", "tokens"]
    assert done["stages"]["tokens"]["kl"] != done["stages"]["tuned"]["kl"]
    assert done["pruned"] == done["stages"]["tokens"]["values"]["accuracy"]
    assert done["macs_ratio"] < 0.9
    assert done["reload_difference"] == 0
    assert schedule(tmp_path / "short").keep == (60, 30, 30)
    other = result("prune", small, *units, *place[:2], "--output", tmp_path / "units")
    assert other["stages"]["tuned"]["kl"] == done["stages"]["tuned"]["kl"]  # training has seen every token
    assert "tokens" not in other


def test_zeros_go_before_the_schedule(call, small, data, tmp_path):
    arguments = ["--data", data, "--sparsity", 0.5, "--tokens", "mild", "--output", tmp_path / "short"]
    done = call("prune", small, *arguments)
    assert done.code == 0, done.err
    assert "fewer tokens" in done.out
    assert "a block works on" in done.out
    weight = load_model(tmp_path / "short").get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_tokens_of_images_are_merged(result, tmp_path):
    from tests.tasks.media_data import write_image_model

    folder = write_image_model(tmp_path / "vision")
    result("prune", folder, "--merge", "80", "--output", tmp_path / "short")
    assert schedule(tmp_path / "short").method == "merge"


def test_run_answers_as_the_model_does(result, short, small):
    texts = ["good film is the plot", "bad actor and the awful scene was dull"]
    here, there = result("run", short, *texts), result("run", small, *texts)
    assert str(here) != str(there)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", pytest.param("openvino", marks=pytest.mark.long)])
def test_an_export_keeps_to_the_schedule(runtime, result, call, short, small, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    from secateur.deploy import target

    arguments = ["--to", runtime, "--output", tmp_path / "artefact"]
    assert call("export", short, *arguments).code == 0  # which compares with the model at several lengths
    feed = {"input_ids": np.random.default_rng(0).integers(4, 20, (2, 30)), "attention_mask": np.ones((2, 30), int)}
    logits = target.load(tmp_path / "artefact")(feed)["logits"]
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in feed.items()}
        expected, whole = (load_model(folder)(**inputs).logits.numpy() for folder in (short, small))
    assert np.abs(logits - expected).max() < 1e-4
    assert np.abs(logits - whole).max() > 1e-3


def test_what_is_refused(refused, small, data, place, tmp_path):
    def prune(*options, model=small):
        return refused("prune", model, *options, "--output", place / "out")

    assert prune("--tokens", "most") == (
        "'most' is no schedule of tokens; use exact, mild, mid, fast, or per cents: 80,65,50"
    )
    assert prune("--tokens", "mid", "--keep", KEEP) == "--tokens and --keep exclude each other; pass one"
    assert "tokens that are gone do not come back" in prune("--keep", "50,80")
    assert "give whole numbers from 1 to 100" in prune("--keep", "50,0")
    assert "4 per cents are given for 3 blocks; give at most 3" in prune("--keep", "80,65,50,40")
    assert prune("--merge", "mid").endswith("leave tokens of texts out instead (--tokens, or prune_tokens)")
    assert prune("--tokens", "mid", "--fine-tune", 1) == (
        "--fine-tune has no meaning in giving a model a schedule of tokens; leave it out"
    )
    assert prune("--tokens", "mid", "--speed-up", 2, "--on", "onnx", "--data", data) == (
        "a search for a target gives no schedule of tokens; leave out --tokens, and give it to the folder that is "
        "written: secateur prune FOLDER --tokens mid --output OTHER"
    )
    assert "--keep has no meaning in a --sweep, which lists" in prune("--keep", KEEP, "--sweep", 0.5, "--data", data)
    assert "pruning block by block gives no schedule" in prune("--tokens", "mid", "--calibration", data)
    for more in ([], ["--sparsity", 0.5]):
        sentence = prune("--tokens", "mid", *more, model=tmp_path / "model.keras")
        assert "is a .keras file, which shows no attention of its blocks" in sentence
    assert prune("--tokens", "mid", "--sparsity", 0.5, "--uniform", "--data", data) == (
        "--uniform demands a stock checkpoint, which holds no schedule of tokens; leave out --uniform or --tokens"
    )


def test_a_model_that_reads_every_token_is_refused_before_the_work(refused, place, tmp_path):
    tagger = write_classifier(tmp_path / "tagger", "BertForTokenClassification")
    rows = [("good film", "LABEL_0 LABEL_1"), ("bad plot", "LABEL_1 LABEL_0")] * 20
    tags = write_csv(tmp_path / "tags.csv", rows, ("text", "tags"))
    for more in ([], ["--data", tags, "--sparsity", 0.5, "--fine-tune", 1]):
        assert "reads other tokens than the first" in refused(
            "prune", tagger, "--tokens", "mid", *more, "--output", place / "out"
        )
