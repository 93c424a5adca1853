"""The commands on `.keras` files: the jobs run, and bad input is one sentence."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

import secateur
from secateur.cli import main
from secateur.record import read_record
from tests.keras import models


def call(capsys, *words, command="prune"):
    with pytest.raises(SystemExit) as exit:
        main([command, *map(str, words)])
    told = capsys.readouterr()
    return exit.value.code, told.out, told.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.mlp().save("model.keras")
    models.transformer(blocks=1).save("text.keras")
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.normal(size=(80, 6)).astype("float32"), y=rng.integers(0, 3, 80))
    return tmp_path


@pytest.mark.slow
def test_units_go(here, capsys):
    words = ["model.keras", "--data", "data.npz", "--criterion", "taylor", "--pattern", "ffn", "--sparsity", 0.5]
    code, out, err = call(capsys, *words, "--output", "small", "--fine-tune", 1, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["difference"] <= 1e-5
    assert result["reload_difference"] == 0
    with np.load("data.npz") as arrays:
        held_out = sum(round(0.1 * count) for count in np.bincount(arrays["y"]))
    assert (result["task"], result["rows"]) == ("classification", held_out)
    assert list(result["stages"]) == ["dense", "pruned", "tuned"]
    assert result["pruned"] == result["stages"]["tuned"]["values"]["accuracy"]
    record = read_record(Path(result["folder"]))
    assert [stage.name for stage in record.stages] == ["dense", "pruned", "fine-tuned"]
    assert (record.quality.pruned, record.sizes.parameters) == (result["pruned"], result["total"])
    small = secateur.open("small")
    assert [small.layout.axes[name].size for name in ("L0.ffn", "L1.ffn")] == [5, 4]
    assert result["total"] == small.model.count_params()


@pytest.mark.slow
def test_weights_go_gradually(here, capsys):
    words = ["model.keras", "--data", "data.npz", "--sparsity", 0.75, "--gradual", "--fine-tune", 2]
    code, _, err = call(capsys, *words, "--output", "sparse", "--batch-size", 8, "--eval-data", "data.npz")
    assert code == 0, err
    plan = secateur.Plan.load("sparse")
    host = secateur.open("sparse")
    assert plan.provenance["gradual"]
    for name, mask in plan.masks.items():
        assert abs((~mask).mean() - 0.75) < 0.01
        assert not host.read(name)[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "none.npz", "--sparsity", 0.5], "no data at none.npz"),
        (["--data", "model.keras", "--sparsity", 0.5], "is no .npz"),
        (["--data", "bad.npz", "--sparsity", 0.5], "needs arrays y and x"),
        (["--data", "data.npz", "--sweep", "0.5"], "--sweep has no meaning in a run on a .keras file"),
        (["--data", "data.npz", "--sparsity", 0.5, "--fine-tune", 1.4], "whole epochs"),
        (["--data", "data.npz"], "how much"),
        (["--data", "data.npz", "--pattern", "head", "--sparsity", 0.5], "no axis or kind 'head'"),
    ],
)
def test_bad_input(here, capsys, words, sentence):
    np.savez("bad.npz", z=np.zeros(3))
    code, _, err = call(capsys, "model.keras", *words, "--output", "out")
    assert code == 2
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert not (here / "out").exists()


def test_inspect_prints_the_layout(here, capsys):
    code, out, err = call(capsys, "text.keras", "--layout", command="inspect")
    assert code == 0, err
    assert out.strip() == str(secateur.open("text.keras").layout)
    code, out, err = call(capsys, "text.keras", "--json", command="inspect")
    assert code == 0, err
    told = json.loads(out)
    assert told["example"] == {"ids": [1, models.LENGTH]}
    assert told["parameters"] == keras.saving.load_model("text.keras").count_params()
    heads = next(axis for axis in told["axes"] if axis["axis"] == "L0.head")
    assert (heads["size"], heads["frozen"]) == (4, None)
    code, out, err = call(capsys, "text.keras", command="inspect")
    assert "L0.ffn" in out
    assert "LayerNormalization takes its statistics over it" in out


def test_eval_scores_a_classifier(here, capsys):
    code, out, err = call(
        capsys, "model.keras", "--data", "data.npz", "--against", "model.keras", "--json", command="eval"
    )
    assert code == 0, err
    told = json.loads(out)
    with np.load("data.npz") as data:
        answers = keras.saving.load_model("model.keras").predict(data["x"], verbose=0).argmax(-1)
        assert told["values"]["accuracy"] == (answers == data["y"]).mean()
    assert (told["rows"], told["flips"], told["drop"], told["drop_interval"]) == (80, 0, 0, [0, 0])
    assert abs(told["kl"]) < 1e-12


def test_a_drop_is_compared_in_pairs(here, capsys):
    """The interval of the drop, drawn again by hand: the same rows of both models each time."""
    other = models.mlp()
    kernel = other.weights[0]
    kernel.assign(np.zeros(kernel.shape))
    other.save("other.keras")
    words = ["other.keras", "--data", "data.npz", "--against", "model.keras", "--json"]
    code, out, err = call(capsys, *words, command="eval")
    assert code == 0, err
    told = json.loads(out)
    with np.load("data.npz") as data:
        right = [
            keras.saving.load_model(name).predict(data["x"], verbose=0).argmax(-1) == data["y"]
            for name in ("model.keras", "other.keras")
        ]
    rng = np.random.default_rng(0)
    draws = [rng.integers(80, size=80) for _ in range(1000)]
    drops = [right[0][rows].mean() - right[1][rows].mean() for rows in draws]
    assert told["metric"] == "accuracy"
    assert told["drop"] == pytest.approx(right[0].mean() - right[1].mean())
    assert told["drop_interval"] == pytest.approx(np.quantile(drops, [0.025, 0.975]).tolist())


def test_a_model_that_gives_nan_is_not_scored(here, capsys):
    model = models.mlp()
    model.weights[-1].assign(np.full(model.weights[-1].shape, np.nan))
    model.save("nan.keras")
    for command, words in (("eval", []), ("prune", ["--sparsity", 0.5, "--output", "out"])):
        code, _, err = call(capsys, "nan.keras", "--data", "data.npz", *words, command=command)
        assert code == 2
        assert "NaN or infinity" in " ".join(err.split())
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", ["--output", "out"], "is trained by `model.fit` in Python"),
        ("train", ["--output", "out"], "secateur.keras.GradualPruning"),
        ("eval", [], "pass --data FILE.npz"),
        ("inspect", ["--task", "X"], "--task has no meaning in a run on a .keras file"),
        ("export", ["--to", "coreml", "--output", "out"], "no runtime 'coreml' for Keras models"),
        ("export", ["--to", "keras", "--output", "out"], "is no target of an export"),
        ("export", ["--to", "onnx", "--int8", "--output", "out"], "--int8 has no meaning in a run on a .keras file"),
        ("export", ["--to", "onnx", "--batch", 2, "--output", "out"], "takes any batch"),
        ("export", ["--to", "onnx", "--length", 9, "--output", "out"], "have fixed sizes"),
        ("export", ["--to", "onnx", "--output", "data.npz"], "data.npz exists"),
        (
            "prune",
            ["--output", "out", "--layout-file", "none"],
            "--layout-file has no meaning in a run on a .keras file",
        ),
        ("prune", ["--output", "out", "--max-length", 9], "--max-length has no meaning in a run on a .keras file"),
        ("eval", ["--text-column", "a"], "--text-column has no meaning in a run on a .keras file"),
        ("bench", ["text.keras", "--runtime", "tensorrt"], "no runtime 'tensorrt' for Keras models"),
        ("bench", ["data.npz"], "data.npz is no .keras file"),
        ("bench", ["none.keras"], "no Keras model at none.keras"),
    ],
)
def test_refused(here, capsys, command, words, sentence):
    code, _, err = call(capsys, "model.keras", *words, command=command)
    assert code == 2, err
    assert sentence in " ".join(err.split())
    assert "Traceback" not in err
    assert not (here / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["savedmodel", "litert", "onnx", "openvino"])
def test_export_agrees_with_keras(here, capsys, to):
    from secateur.deploy.jobs.keras_jobs import ALIASES, PACKAGES
    from secateur.keras.export import TARGETS

    target = ALIASES.get(to, to)
    if keras.backend.backend() not in TARGETS[target]:
        pytest.skip(f"{to} is not written on this backend")
    if target in PACKAGES:
        pytest.importorskip(PACKAGES[target])
    code, out, err = call(capsys, "text.keras", "--to", to, "--output", "out", "--json", command="export")
    if (keras.backend.backend(), target) == ("torch", "onnx"):  # whose exporter writes the batch size into the program
        assert (code, (here / "out").exists()) == (2, False)
        assert "the exported program does not run at shape" in err
        return
    assert code == 0, err
    told = json.loads(out)
    assert told["target"] == target
    assert told["parity"]["relative_error"] <= 1e-4
    assert told["parity"]["made_up"]
    assert told["parameters"] == keras.saving.load_model("text.keras").count_params()
    code, _, err = call(capsys, "text.keras", "--to", to, "--output", "out", command="export")
    assert code == 2
    assert "out exists" in err


@pytest.mark.slow
def test_bench_times_files_side_by_side(here, capsys):
    words = ["model.keras", "text.keras", "--runtime", "keras", "--batch", "2", "--turns", "1", "--json"]
    code, out, err = call(capsys, *words, command="bench")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["model"], row["runtime"], row["batch"], row["error"]) for row in rows] == [
        ("model", "keras", 2, ""),
        ("text", "keras", 2, ""),
    ]
    assert all(row["median_ms"] > 0 and row["bytes"] > 0 for row in rows)
