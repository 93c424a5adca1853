"""Random damage to saved models, in a child process, so that a crash is seen: see tests/runtime/mutations.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from secateur.kernels.native import load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


def damaged(how_many, seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.mutations", str(how_many), str(seed)],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"seed {seed}: return code {done.returncode}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_damage_is_refused_or_harmless():
    counts = damaged(300, 0)
    assert sum(counts.values()) >= 300
    assert min(counts["manifest refused"], counts["manifest same"], counts["byte refused"]) > 5


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_much_damage(seed):
    assert sum(damaged(2500, seed).values()) >= 2500
