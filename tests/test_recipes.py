"""The three textbook procedures run whole, on a real pretrained model and real reviews, with few rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["magnitude_threshold", "gradient_rank", "attention_heads"])
def test_recipe(name, cache, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, RECIPES / f"{name}.py", "--output", output, "--rows", "160", "--test-rows", "64"]
    done = subprocess.run(
        [*map(str, command), "--cache", str(cache)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = dict(re.findall(r"^(\w[\w -]*?)\s+accuracy (0\.\d+|1\.0+)", done.stdout, re.MULTILINE))
    assert scores["reloaded"] == scores["fine-tuned"]
    assert len(scores) == 4
    assert (output / "config.json").is_file()
    assert (output / "plan.json").is_file()


@pytest.mark.slow
def test_keras_recipe(tmp_path):
    pytest.importorskip("tensorflow")
    command = [sys.executable, str(RECIPES / "keras_threshold.py"), "--output", str(tmp_path / "out"), "--rows", "256"]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = re.findall(r"^(\w+)\s+dense (0\.\d+|1\.0+)  fine-tuned (0\.\d+|1\.0+)", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in scores] == ["mlp", "transformer"]
    assert (tmp_path / "out" / "mlp.keras").is_file()


def test_every_recipe_is_run_here():
    assert {p.stem for p in RECIPES.glob("*.py")} == {
        "magnitude_threshold",
        "gradient_rank",
        "attention_heads",
        "common",
        "keras_threshold",
    }
