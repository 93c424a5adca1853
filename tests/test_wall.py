"""The core needs no framework, and never imports one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

CORE = (
    "arrays budget check cost criteria data dims errors evaluate files host "
    "layout opening plan pruning repair schedule select stats"
)


def test_the_core_lives_without_frameworks():
    code = f"""
import importlib, sys
frameworks = ("torch", "transformers", "tensorflow", "keras")
for name in frameworks:
    sys.modules[name] = None
import secateur
for name in {CORE.split()!r}:
    importlib.import_module("secateur." + name)
layout = secateur.Layout.from_text("axes\\n  ffn 4 ffn\\nparameters\\n  w : ffn 2 < x 1")
assert layout.shape("w") == (4, 2)
assert not [name for name in sys.modules if name.startswith("secateur.torch")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("room", "blocked"), [("torch", "keras tensorflow"), ("keras", "torch transformers")])
def test_each_host_lives_without_the_other(room, blocked):
    """No file of one host names the other's framework, but where Keras itself runs on PyTorch."""
    allowed = {"gradients.py": 1, "export.py": 1, "threads.py": 1} if room == "keras" else {}
    folder = Path(secateur.__file__).parent / room
    assert folder.is_dir()
    other = "keras" if room == "torch" else "torch"
    for file in folder.rglob("*.py"):
        found = re.findall(
            rf"^(?:from|import) ({'|'.join(blocked.split())}|secateur\.{other})\b", file.read_text(), re.M
        )
        inside = re.findall(
            rf"^ +(?:from|import) ({'|'.join(blocked.split())}|secateur\.{other})\b", file.read_text(), re.M
        )
        assert not found, file
        assert len(inside) <= allowed.get(file.name, 0), file


@pytest.mark.slow
def test_the_keras_host_runs_without_torch_and_transformers():
    pytest.importorskip("tensorflow")
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import keras, secateur
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(6), keras.layers.Dense(2)])
assert secateur.keras.prune(model, sparsity=0.5) is model
assert secateur.open(model).layout.axes["L0.ffn"].size == 6
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
