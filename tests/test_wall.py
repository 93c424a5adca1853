"""The core needs no framework, and never imports one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

HOME = Path(secateur.__file__).parent
CORE = [
    ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
    for place in ("*.py", "criteria/*.py", "repair/*.py")
    for file in sorted(HOME.glob(place))
    if file.parent != HOME or not file.name.startswith("_")
]
"""Every module that belongs to no framework, runtime or command."""


def test_the_core_lives_without_frameworks():
    code = f"""
import importlib, sys
frameworks = ("torch", "transformers", "tensorflow", "keras")
for name in frameworks:
    sys.modules[name] = None
import secateur
for name in {CORE!r}:
    importlib.import_module("secateur." + name)
layout = secateur.Layout.from_text("axes\\n  ffn 4 ffn\\nparameters\\n  w : ffn 2 < x 1")
assert layout.shape("w") == (4, 2)
assert not [name for name in sys.modules if name.startswith("secateur.torch")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_core_stands_in_the_house():
    assert {"recipe", "repairing", "repair.sparsegpt", "criteria.ria"} <= set(CORE)
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    listed = {word.strip("/") for word in re.findall(r"`([^`]+)`", rows)}
    assert [name for name in CORE if "." not in name and name not in listed] == []


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
def test_the_keras_host_and_its_commands_run_without_torch_and_transformers(tmp_path):
    pytest.importorskip("tensorflow")
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import keras, numpy, secateur
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(6), keras.layers.Dense(2)])
assert secateur.keras.prune(model, sparsity=0.5) is model
assert secateur.open(model).layout.axes["L0.ffn"].size == 6
model.save("model.keras")
numpy.savez("data.npz", x=numpy.ones((30, 4), "float32"), y=numpy.arange(30) % 2)
from secateur.cli import main
for line in (
    "inspect model.keras",
    "eval model.keras --data data.npz",
    "prune model.keras --data data.npz --pattern ffn --sparsity 0.5 --output small",
    "export small --to litert --output lite",
    "bench model.keras small --runtime litert --batch 1 --turns 1",
):
    try:
        main(line.split())
    except SystemExit as exit:
        assert exit.code == 0, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_torch_host_runs_without_keras_and_tensorflow(tmp_path):
    pytest.importorskip("torch")
    code = """
import sys
sys.modules.update(dict.fromkeys(("keras", "tensorflow")))
import torch, secateur
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
x = (torch.ones(3, 4),)
host = secateur.open(model, x)
plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Unit("dense"), 0.5)
assert secateur.verify(host, plan, [x]).difference <= 1e-6
host.resize(plan)
assert model[0].out_features == 3
try:
    secateur.open("model.keras")
except secateur.errors.ModelError as error:
    assert "keras is not installed" in str(error), error
else:
    raise AssertionError("a .keras file was opened")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
