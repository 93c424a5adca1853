"""`secateur prune model.keras`: the job runs, and bad data is one sentence."""

import json

import numpy as np
import pytest

import secateur
from secateur.cli import main
from tests.keras import models


def call(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main(["prune", *map(str, words)])
    told = capsys.readouterr()
    return exit.value.code, told.out, told.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.mlp().save("model.keras")
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
        (["--data", "data.npz", "--sweep", "0.5"], "--sweep is not there for Keras models"),
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
