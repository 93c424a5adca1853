"""Runs tests/keras in a process of its own for each Keras backend, as Keras takes its backend once and for all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# none of them fast: a process takes seconds to import a backend, and half a minute for the tests
RUNS = [
    pytest.param("torch", "not slow", id="torch", marks=pytest.mark.slow),
    pytest.param("torch", "slow", id="torch-slow", marks=pytest.mark.long),
    pytest.param("tensorflow", "not slow", id="tensorflow", marks=pytest.mark.slow),
    pytest.param("tensorflow", "slow", id="tensorflow-slow", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("backend", "marks"), RUNS)
def test_keras(backend, marks):
    for package in ("keras", backend):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "SECATEUR_KERAS_TESTS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = [sys.executable, "-m", "pytest", str(HERE / "keras"), "-x", "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-W", "ignore"], capture_output=True, text=True, env=environment, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
