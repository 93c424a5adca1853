"""`secateur prune` with a target: what is asked and what was measured, or a sentence and exit code 1."""

import json

import pytest
import transformers

from tests.text_models import write_classifier, write_texts

QUICK = ("--heal-budget", 0, "--search-budget", 0, "--batch-size", 16)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("model") / "classifier")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "reviews.csv", 120)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_limit_is_met_measured_and_shown(result, call, classifier, reviews, tmp_path):
    arguments = ["prune", classifier, "--data", reviews, "--target", "macs<=0.6", "--target", "params<=0.9", *QUICK]
    done = result(*arguments, "--output", tmp_path / "small")
    assert done["met"]
    assert done["best"]["predicted"]["macs"] <= 0.6
    assert done["best"]["parameters_share"] <= 0.9
    assert done["drop"] == pytest.approx(done["dense"] - done["pruned"])
    assert done["folder"] == str(tmp_path / "small")
    small = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert small.num_parameters() == done["best"]["parameters"]
    shown = result("inspect", tmp_path / "small", "--levels", "--plot", tmp_path / "levels.png")
    assert {"L0.head", "L0.ffn", "L1.head", "L1.ffn"} <= {axis["axis"] for axis in shown["axes"]}
    assert (tmp_path / "levels.png").read_bytes()[:4] == b"\x89PNG"
    evaluated = call("eval", tmp_path / "small", "--check", "--data", reviews)
    assert evaluated.code == 0
    assert "accuracy" in evaluated.out


@pytest.mark.slow
def test_what_is_missed_writes_nothing_and_ends_with_1(call, classifier, reviews, tmp_path):
    arguments = ["prune", classifier, "--data", reviews, "--target", "macs<=0.6", "--max-divergence", 1e-12, *QUICK]
    ended = call(*arguments, "--output", tmp_path / "small", "--json")
    assert ended.code == 1
    said = json.loads(ended.out)
    assert not said["met"]
    assert len(said["frontier"]) == 4
    assert not (tmp_path / "small").exists()
    closest = call(*arguments, "--closest", "--output", tmp_path / "small", "--json")
    assert closest.code == 1
    assert json.loads((tmp_path / "small" / "secateur-search.json").read_text())["met"] is False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--speed-up", 2], "--on"),
        (["--speed-up", 0.5, "--on", "onnx"], "0.5"),
        (["--target", "params<=2x"], "params<=2x"),
        (["--target", "speed<=2"], "speed"),
        (["--frontier", "1,2", "--on", "onnx"], "--frontier 1,2 is no list of speed-ups above 1"),
        (["--frontier", "1.5,2"], "a frontier is measured on a runtime; name one (--on)"),
        (["--target", "macs<=0.5", "--for", "vlm"], "no server 'vlm'; there is vllm, sglang, mlx, llama.cpp"),
        (["--target", "macs<=0.5", "--heal-budget", "soon"], "--heal-budget soon is no duration"),
        (["--target", "macs<=0.5", "--criterion", "taylor"], "--criterion has no meaning in a search for a target"),
        (["--max-drop", 0.01, "--max-divergence", 0.01], "drop"),
        (["--sparsity", 0.5, "--confident"], "--confident has no meaning in a run without"),
        (["--sparsity", 0.5, "--zeros"], "--zeros has no meaning in a run without"),
        (
            ["--speed-up", 2, "--on", "onnx", "--zeros"],
            "zeros are fast on secateur, and the latency is limited on onnx",
        ),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(refused, classifier, reviews, tmp_path, options, sentence):
    assert sentence in refused("prune", classifier, "--data", reviews, *options, "--output", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_keras_file_is_refused(refused, reviews, tmp_path):
    (tmp_path / "model.keras").write_bytes(b"")
    said = refused(
        "prune", tmp_path / "model.keras", "--data", reviews, "--target", "macs<=0.5", "--output", tmp_path / "small"
    )
    assert "a .keras file has no statistics for a search yet" in said
