"""The walls of the house: who imports whom, by floors; the core without frameworks; each host without the other."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import secateur

HOME = Path(secateur.__file__).parent
CORE = [
    ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
    for place in ("*.py", "criteria/*.py", "repair/*.py", "data/*.py", "metrics/*.py")
    for file in sorted(HOME.glob(place))
    if file.parent != HOME or not file.name.startswith("_")
]
"""Every module that belongs to no framework, runtime or command."""

FLOORS = (
    "_version errors arrays agreement files schemas dims summary notebook layout plan token_schedule card record",
    "stats criteria budget select fit schedule scores data metrics documents kernels",
    "host repair recipe",
    "pruning check cost find_host",
    "records deploy.runner",
    "torch.base",
    "torch.trace",
    "torch.data torch.stats",
    "torch.tokens",
    "torch.shrink",
    "torch.files",
    "torch.train",
    "torch.host torch.open torch.repair_loops",
    "torch.reloaded",
    "torch.blockwise",
    "torch.stream",
    "keras",
    "tasks.base",
    "tasks",
    "dynamic",
    "runtime.layers",
    "runtime.program",
    "runtime.run",
    "runtime.compile_model runtime.saving",
    "training",
    "deploy.operator_library",
    "deploy.target",
    "deploy.onnx_graph",
    "deploy.targets",
    "deploy.jobs deploy.gguf deploy.decilm",
    "search search.choosing search.sparse search.streamed",
    "report",
    "jobs jobs.language",
    "cli cli.pruning __main__",
)
"""From the ground up. A module imports from its own floor and from those below."""

BY_STRING = {
    "secateur": "public names load when they are first used",
    "secateur.runtime": "public names load when they are first used",
    "secateur.torch": "its modules load when they are first used",
    "secateur.search": "public names load when they are first used",
    "secateur.deploy": "public names load when they are first used",
    "secateur.find_host": "the only place that knows which frameworks there are",
    "secateur.repair.forms": "the fast form of an inner loop, if the arrays are tensors",
    "secateur.deploy.target": "one module a runtime",
    "secateur.deploy.runner": "one loader a runtime; the file itself travels without secateur",
    "secateur.kernels.native": "the compiled module, which may be missing",
    "secateur.cli.keras": "commands for Keras models start without PyTorch",
}
"""Modules that may import modules of ours by a name in a string, and why. Circles through them are meant."""

INSIDE_FUNCTIONS = 8
"""The most imports of our own modules inside functions, outside `cli`; each says on its line why it is there."""
FILES = 16
"""The most modules in a folder; the core and `keras` have more, each of which says what it is."""


class Import(NamedTuple):
    """One import of a module of ours. kind: "top", "function" or "string"."""

    module: str
    kind: str
    line: int


def module_name(file):
    parts = ("secateur", *file.relative_to(HOME).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): file for file in sorted(HOME.rglob("*.py"))}


def imports_of(module):
    """Every import of our own modules in a file, but those for type checkers alone."""
    tree = ast.parse(SOURCES[module].read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    inside = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        kind = "function" if id(node) in inside else "top"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "secateur":
            for name in {f"{node.module}.{alias.name}" for alias in node.names}:
                yield Import(name if name in SOURCES else node.module, kind, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in SOURCES:
                    yield Import(alias.name, kind, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value.partition(":")[0]
            if named in SOURCES and "." in named:
                yield Import(named, "string", node.lineno)


GRAPH = {module: sorted(set(imports_of(module))) for module in SOURCES}


def floor_of(module):
    """The number of a module's floor; None for a package that only loads public names."""
    path = module.removeprefix("secateur").lstrip(".")
    for number, rooms in enumerate(FLOORS):
        if any(path == room or path.startswith(f"{room}.") for room in rooms.split()):
            return number
    return None


def test_there_is_no_circle():
    graph = {
        module: {i.module for i in found if i.module != module and not (i.kind == "string" and module in BY_STRING)}
        for module, found in GRAPH.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_go_down():
    homeless = [m for m in SOURCES if floor_of(m) is None]
    assert homeless == ["secateur", "secateur.deploy", "secateur.runtime", "secateur.torch"]
    wrong = [
        f"{module}:{i.line} imports {i.module}"
        for module, found in GRAPH.items()
        for i in found
        if floor_of(module) is not None and floor_of(i.module) is not None
        if floor_of(i.module) > floor_of(module) and not (i.kind == "string" and module in BY_STRING)
    ]
    assert wrong == []
    rooms = " ".join(FLOORS).split()
    missing = [r for r in rooms if f"secateur.{r}" not in SOURCES]
    assert missing == []


def test_imports_by_string_are_few_and_have_a_reason():
    by_string = {module for module, found in GRAPH.items() if any(i.kind == "string" for i in found)}
    assert by_string <= set(BY_STRING)
    loads = re.compile(r"\bimport_module\(|\b__import__\(")
    assert {module for module, file in SOURCES.items() if loads.search(file.read_text())} <= set(BY_STRING)


def test_imports_inside_functions_are_few_and_have_a_reason():
    found = {
        (module, i.line)
        for module, imports in GRAPH.items()
        for i in imports
        if i.kind == "function" and not module.startswith("secateur.cli")
    }
    assert len(found) <= INSIDE_FUNCTIONS, sorted(found)
    lines = {(module, line): SOURCES[module].read_text().splitlines()[line - 1] for module, line in found}
    assert [place for place, line in lines.items() if "#" not in line] == []


def test_folders_are_small():
    counts = {
        folder.name: len(list(folder.glob("*.py"))) for folder in HOME.rglob("*") if (folder / "__init__.py").is_file()
    }
    assert {name for name, count in counts.items() if count > FILES} <= {"keras"}


def test_the_core_lives_without_frameworks():
    code = f"""
import importlib, sys
frameworks = ("torch", "transformers", "tensorflow", "keras")
for name in frameworks:
    sys.modules[name] = None
import secateur
assert secateur.budget.Uniform is secateur.Uniform and callable(secateur.schedule.cubic) and secateur.torch
for name in {CORE!r}:
    importlib.import_module("secateur." + name)
layout = secateur.Layout.from_text("axes\\n  ffn 4 ffn\\nparameters\\n  w : ffn 2 < x 1")
assert layout.shape("w") == (4, 2)
assert not [name for name in sys.modules if name.startswith("secateur.torch.")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_room_stands_on_the_page():
    assert {"recipe", "repair.walk", "repair.sparsegpt", "criteria.ria"} <= set(CORE)
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    listed = {word.strip("/") for word in re.findall(r"[\w./]+", page)}
    rooms = {room for room in " ".join(FLOORS).split() if not room.startswith("_")}
    assert sorted(room for room in rooms if not {room.replace(".", "/"), room.split(".")[-1]} & listed) == []


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
assert type(host) is secateur.torch.host.TorchHost and callable(secateur.tasks.find)
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
