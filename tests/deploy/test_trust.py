"""An artefact that a stranger made runs nothing but its program: no Python, no library beside it, no other folder."""

import contextlib
import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from secateur.deploy import runner, target
from secateur.deploy.jobs import bench
from secateur.deploy.jobs.kit import hashes, read_results, write_kit
from secateur.deploy.target import DeployError
from secateur.kernels.native import load_native

from .test_runner import FEED, GRAPH, PORTS, write

IDS = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "fill": "ids", "low": 0, "high": 9}


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A model folder whose configuration is Python code that leaves a file, and that file."""
    modules = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    mark, folder = tmp_path / "it-ran", tmp_path / "trap"
    folder.mkdir()
    (folder / "configuration_trap.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig\n"
        "class TrapConfig(PretrainedConfig):\n    model_type = 'trap'\n"
    )
    auto = {"AutoConfig": "configuration_trap.TrapConfig", "AutoModel": "configuration_trap.TrapConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": auto, "architectures": ["Trap"]}))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder, mark


def describe(folder, **changes):
    """`artefact.json` in a folder that may be there already."""
    graph = {"files": ["model.onnx"], "inputs": [IDS], "outputs": ["y"]}
    (folder / "model.onnx").write_bytes(b"")
    info = {"format": 1, "target": "onnx", "graphs": {"model": graph}, **changes}
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("aim", ["onnx", "torch", "secateur"])
@pytest.mark.parametrize("loader", ["torch", "secateur"])
def test_a_description_runs_no_python(trap, loader, aim):
    folder, mark = trap
    described = {"target": aim, "loader": loader, "source": str(folder), "options": {"trust_remote_code": True}}
    describe(folder, **described)
    for run in (runner.load, target.load):
        with pytest.raises((runner.ArtefactError, DeployError)):
            run(folder)
    assert not mark.exists()
    described.pop("options")
    describe(folder, **described)
    with pytest.raises(runner.ArtefactError, match="artefact is loaded by|points at a model folder"):
        runner.load(folder)
    assert not mark.exists()


def test_bench_runs_no_python_of_an_artefact(trap):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, mark = trap
    describe(folder, loader="torch", source=str(folder), options={"trust_remote_code": True})
    (row,) = bench.bench([folder], ["onnx"], batch=[1], length=[2], turns=1).timings
    assert row.error
    assert not mark.exists()


def test_no_file_of_ours_switches_remote_code_on(trap):
    folder, mark = trap
    graph = {"files": [], "inputs": [IDS], "outputs": []}
    describe(folder, target="torch", source=str(folder), graphs={"model": graph})
    with pytest.raises(runner.ArtefactError):
        runner.load(folder, ours={})
    assert not mark.exists()
    with contextlib.suppress(runner.ArtefactError):  # the caller may; that the code then ran shows what this trap is
        runner.load(folder, ours={"trust_remote_code": True})
    assert mark.exists()


def test_bench_hands_on_what_its_caller_permits(classifier, monkeypatch):
    given = []

    def measure(made, *arguments, ours, **options):
        given.append(ours)
        return {name: {"error": "not timed"} for name in made}

    monkeypatch.setattr(runner, "measure", measure)
    for options in ({}, {"trust_remote_code": True, "token": "secret"}):
        (row,) = bench.bench([classifier], ["torch"], batch=[1], length=[2], **options).timings
        assert row.error == "not timed"
    assert given == [{"dense": {}}, {"dense": {"trust_remote_code": True}}]


def test_an_artefact_of_strangers_is_not_ours(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    given = []
    monkeypatch.setattr(runner, "measure", lambda made, *a, ours, **o: given.append(ours) or {"a": {"error": "x"}})
    bench.bench([write(tmp_path / "a")], ["onnx"], batch=[1], length=[2])
    assert given == [{}]


@pytest.mark.parametrize(
    ("loader", "aim", "said"),
    [
        ("torch", "onnx", "an onnx artefact is loaded by onnx or keras program, not by 'torch'"),
        ("keras", "litert", "a litert artefact is loaded by litert or keras program, not by 'keras'"),
        ("keras program", "executorch", "an executorch artefact is loaded by executorch, not by 'keras program'"),
        ("openvino", "onnx", "not by 'openvino'"),
    ],
)
def test_a_loader_belongs_to_its_target(tmp_path, loader, aim, said):
    with pytest.raises(runner.ArtefactError, match=said):
        runner.load(describe(tmp_path, loader=loader, target=aim))


def test_a_target_opens_files_of_its_own_kind(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    graph = {"files": ["saved_model.pb"], "inputs": [IDS], "outputs": ["y"]}
    with pytest.raises(runner.ArtefactError, match=r"saved_model\.pb is no \.tflite file"):
        runner.load(describe(tmp_path, target="litert", loader="keras program", graphs={"model": graph}))
    described = {"target": "saved_model", "loader": "keras program", "graphs": {"model": graph}}
    with pytest.raises(runner.ArtefactError, match="pass ours={} if you made it"):
        runner.load(describe(tmp_path, **described))


# -- what a description may say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": True}, "has format True; this version reads 1"),
        ({"format": 2, "anything": {}}, "has format 2; this version reads 1"),
        ({"options": {}}, "it has 'options', which this version does not know"),
        ({"parameters": -1}, "parameters is -1, not a whole number"),
        ({"zeros": 2.0}, r"zeros is 2\.0, not a share from 0 to 1"),
        ({"int8": 1}, "int8 is 1, not true or false"),
        ({"levels": 2**70}, "levels is .* not a whole number"),
        ({"sizes": {"../x": 1}}, "which lies outside"),
        ({"sha256": {"artefact.json": "abc"}}, "sha256.*is 'abc', not 64 hexadecimal digits"),
        ({"generation": {"start": 1, "end": [2], "pad": 0}}, "generates, but has no graph 'decode'"),
        ({"source": "/home"}, "names a source"),
        ({"target": 7}, "target is 7, not a text"),
        ({"loader": None}, "loader is None, not a text"),
    ],
)
def test_what_a_description_may_not_say(tmp_path, changes, said):
    with pytest.raises(runner.ArtefactError, match=said):
        runner.read(describe(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra": 1}, r"graphs\.model has 'extra', which this version does not know"),
        ({"files": []}, "names no program"),
        ({"files": [7]}, r"graphs\.model\.files\.0 is 7, not a text"),
        ({"operators": "other"}, "operators is 'other', not secateur_onnx"),
        ({"outputs": ["y", "y"]}, "names 'y' twice"),
        ({"inputs": [IDS, IDS]}, "names 'input_ids' twice"),
        ({"inputs": [{**IDS, "dtype": "object"}]}, "dtype is 'object', not a type of numbers"),
        ({"inputs": [{**IDS, "shape": ["batch", "n"]}]}, "shape.1 is 'n', not a size"),
        ({"inputs": [{**IDS, "shape": [2**20, 2**20]}]}, "is absurdly large"),
        ({"inputs": [{**IDS, "shape": [-1]}]}, "shape.0 is -1, not a size"),
        ({"inputs": [{**IDS, "fill": "code"}]}, "fill is 'code', not"),
        ({"inputs": [{**IDS, "low": 9}]}, "no numbers from 9 to below 9"),
        ({"inputs": [{**IDS, "at_most": {"5": 2}}]}, "bounds dimension '5'"),
        ({"inputs": [{"name": "x"}]}, "inputs.0 lacks 'dtype'"),
        ({"inputs": [IDS] * 5000}, "inputs has 5000 entries"),
    ],
)
def test_what_a_graph_may_not_say(tmp_path, changes, said):
    graph = {"files": ["model.onnx"], "inputs": [IDS], "outputs": ["y"], **changes}
    with pytest.raises(runner.ArtefactError, match=said):
        runner.read(describe(tmp_path, graphs={"model": graph}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is damaged"),
        ('{"format": NaN}', "is damaged"),
        ('{"format": 1, "format": 1}', "has the key 'format' twice"),
        ("[]", "is damaged"),
        ('{"format": 1, "target": "onnx", "graphs": {}, "zeros": 1e999}', "zeros is inf"),
        ('{"a": "' + "x" * (17 * 2**20) + '"}', "bytes, which is more than"),
        ("\ud800", "is damaged"),
    ],
    ids=range(7),
)
def test_descriptions_that_are_no_json(tmp_path, text, said):
    (tmp_path / runner.MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(runner.ArtefactError, match=said):
        runner.read(tmp_path)


def test_links_out_of_the_folder(tmp_path):
    outside, folder = tmp_path / "mine.onnx", tmp_path / "artefact"
    outside.write_bytes(b"mine")
    folder.mkdir()
    describe(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(runner.ArtefactError, match="lies outside"):
        runner.read(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(runner.ArtefactError):
        runner.read(folder)


def test_made_up_inputs_have_a_bound():
    with pytest.raises(runner.ArtefactError, match="more than"):
        runner.made_up(GRAPH, {"batch": 2**30, "length": 2**30})


def test_files_that_have_changed(tmp_path):
    folder = write(tmp_path / "a")
    with pytest.raises(DeployError, match="wrote no hashes; export it again"):
        target.verify_files(folder)
    program = folder / "sum.onnx"
    info = json.loads((folder / runner.MANIFEST).read_text())
    info["sha256"] = {"sum.onnx": hashlib.sha256(program.read_bytes()).hexdigest()}
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    assert target.verify_files(folder) == 1
    program.write_bytes(program.read_bytes()[:-1] + b"?")
    assert runner.read(folder)
    for check in (bench.bench, write_kit):
        folders = [[folder], *([tmp_path / "kit"] if check is write_kit else [])]
        with pytest.raises(DeployError, match=r"sum\.onnx is not the file that was exported; export it again"):
            check(*folders, ["onnx"], check=True)
    info["sha256"] = {"artefact.json": "0" * 64}
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    with pytest.raises(DeployError, match=r"has no hash of sum\.onnx"):
        target.verify_files(folder)


# -- a library beside a program ---------------------------------------------------------------------------------------


def test_a_library_beside_an_artefact_is_not_loaded(tmp_path, monkeypatch):
    folder = write(tmp_path / "a")
    info = json.loads((folder / runner.MANIFEST).read_text())
    info["graphs"]["model"]["operators"] = runner.OPERATORS
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    (folder / "secateur_onnx.so").write_bytes(b"no library")
    given = []
    monkeypatch.setattr(runner, "open_onnx", lambda path, threads, library=None: given.append(library))
    with pytest.raises(runner.ArtefactError, match="runs on secateur's kernels: install secateur"):
        runner.load(folder)
    monkeypatch.setattr(target, "installed_library", lambda: None)
    with pytest.raises(DeployError, match="install secateur"):
        target.load(folder)
    assert given == []


def kit_of(tmp_path, library, digest):
    """A kit of one artefact, whose library is made up."""
    kit = tmp_path / "kit"
    kit.mkdir()
    write(kit / "onnx-0")
    described = {
        "batch": [1],
        "length": [2],
        "threads": 1,
        "turns": 1,
        "runtimes": {"onnx": {"a": "onnx-0"}},
        "id": "k",
        "files": hashes(kit),
    }
    (kit / runner.KIT).write_text(json.dumps({**described, "library": digest}))
    if library is not None:
        (kit / "secateur_onnx.so").write_bytes(library)
    shutil.copyfile(runner.__file__, kit / "device.py")
    return kit


@pytest.mark.parametrize("library", [b"another", None])
def test_a_kit_loads_no_library_but_its_own(tmp_path, library):
    kit = kit_of(tmp_path, library, hashlib.sha256(b"own").hexdigest())
    done = subprocess.run([sys.executable, "-I", "device.py"], cwd=kit, capture_output=True, text=True)
    assert done.returncode != 0
    assert "secateur_onnx.so is not the library that the kit was written with" in done.stderr
    assert "Traceback" not in done.stderr


def changed_program(kit, info):
    program = kit / "onnx-0" / "sum.onnx"
    program.write_bytes(program.read_bytes()[:-1] + b"?")


def changed_description(kit, info):
    path = kit / "onnx-0" / runner.MANIFEST
    path.write_text(path.read_text() + "\n")


def lost_program(kit, info):
    (kit / "onnx-0" / "sum.onnx").unlink()


def hash_of_none(kit, info):
    del info["files"]["onnx-0/sum.onnx"]


def another_folder(kit, info):
    write(kit.parent / "outside")
    info["runtimes"]["onnx"]["a"] = "../outside"


def hashes_outside(kit, info):
    another_folder(kit, info)
    info["files"] |= {f"../outside/{name}": digest for name, digest in hashes(kit.parent / "outside").items()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed_program, r"sum\.onnx is not the file that the kit was written with; copy the kit again"),
        (changed_description, r"artefact\.json is not the file that the kit was written with"),
        (lost_program, r"sum\.onnx is not the file that the kit was written with"),
        (hash_of_none, r"kit\.json has no hash of onnx-0/sum\.onnx; write the kit again"),
        (another_folder, r"kit\.json has no hash of \.\./outside/artefact\.json"),
        (hashes_outside, r"outside/\w+\.\w+ is not the file that the kit was written with"),
        (lambda kit, info: info.pop("files"), r"kit\.json is damaged: it lacks 'files'; copy the kit again"),
        (lambda kit, info: info.update(turns="many"), r"kit\.json is damaged: turns is 'many', not a whole number"),
        (lambda kit, info: info.update(id="k\x1b[2J"), r"kit\.json is damaged: id is 'k\\x1b\[2J', not a text"),
    ],
)
def test_a_changed_kit_is_not_opened(tmp_path, monkeypatch, damage, said):
    monkeypatch.setattr(runner, "measure", lambda *a, **k: pytest.fail("opened"))
    kit = kit_of(tmp_path, None, None)
    info = json.loads((kit / runner.KIT).read_text())
    damage(kit, info)
    (kit / runner.KIT).write_text(json.dumps(info))
    with pytest.raises(runner.ArtefactError, match=said):
        runner.run_kit(kit, 1, lambda text: None)


def test_a_kit_that_is_no_json(tmp_path):
    (tmp_path / runner.KIT).write_text("{")
    with pytest.raises(runner.ArtefactError, match=r"kit\.json is damaged \(JSONDecodeError: .*; copy the kit again"):
        runner.run_kit(tmp_path, 1, lambda text: None)


def test_a_kit_loads_its_own_library(tmp_path, monkeypatch):
    kit = kit_of(tmp_path, b"own", hashlib.sha256(b"own").hexdigest())
    given = []
    monkeypatch.setattr(runner, "measure", lambda *a, library=None: given.append(library) or {})
    runner.run_kit(kit, 1, lambda text: None)
    assert given == [str((kit / "secateur_onnx.so").resolve())]


def test_a_kit_takes_no_links_and_libraries_along(tmp_path):
    pytest.importorskip("onnxscript")
    folder, secret = write(tmp_path / "a"), tmp_path / "secret"
    secret.write_text("mine")
    (folder / "notes").symlink_to(secret)
    (folder / "secateur_onnx.so").write_bytes(b"theirs")
    write_kit([folder], tmp_path / "kit", ["onnx"], batch=[1], length=[2])
    carried = {str(path.relative_to(tmp_path / "kit")) for path in (tmp_path / "kit").rglob("*")}
    assert carried == {"device.py", "kit.json", "onnx-0", "onnx-0/artefact.json", "onnx-0/sum.onnx"}
    kit = runner.read_kit(tmp_path / "kit")
    assert kit["library"] is None
    assert set(kit["files"]) == {"onnx-0/artefact.json", "onnx-0/sum.onnx"}


@pytest.mark.slow
@pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")
def test_a_sparse_program_runs_in_its_kit(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    kept = Path(__file__).parents[1] / "kept" / "first" / "artefacts" / "onnx-sparse" / "model"
    write_kit([kept], tmp_path / "kit", ["onnx"], batch=[1], length=[4], turns=1)
    done = subprocess.run([sys.executable, "-I", "device.py"], cwd=tmp_path / "kit", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read_results(tmp_path / "kit").timings
    assert row.error == ""
    assert row.sparse


# -- any change of a description --------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 2**31, 2**70, 0.5, -1.5, 1e308]),
    st.sampled_from(["", "x", "ids", "mask", "batch", "onnx", "openvino", "torch", "secateur", "keras", "litert"]),
    st.sampled_from(["keras program", "secateur_onnx", "sum.onnx", "../sum.onnx", "/etc/passwd", "\0", "\ud800", "no"]),
    st.sampled_from(["float32", "object", "normal", "saved_model", "a" * 5000, "model", "decode"]),
    st.sampled_from([[], {}, [[]], [1], ["x"], {"x": 1}, {"model": {}}, {"trust_remote_code": True}]),
)
WORDS = "loader source options operators sizes sha256 levels int8 generation at_most x bytes"
KEYS = st.sampled_from(WORDS.split())


def places(value):
    """Every list and object in a value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from places(inner)


def change(value, data):
    """Delete, replace or insert one entry somewhere."""
    inside = data.draw(st.sampled_from(list(places(value))))
    keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
    kind = data.draw(st.sampled_from(["delete", "replace", "insert"] if keys else ["insert"]))
    if kind == "delete":
        del inside[data.draw(st.sampled_from(keys))]
    elif kind == "replace":
        inside[data.draw(st.sampled_from(keys))] = copy.deepcopy(data.draw(VALUES))
    elif isinstance(inside, dict):
        inside[data.draw(KEYS)] = copy.deepcopy(data.draw(VALUES))
    else:
        inside.insert(data.draw(st.integers(0, len(inside))), copy.deepcopy(data.draw(VALUES)))


@pytest.mark.parametrize("loader", [None, "keras program"])
def test_a_changed_description_is_refused_or_says_the_same(tmp_path, loader):
    folder = write(tmp_path / "a", **({"loader": loader} if loader else {}))
    whole = json.loads((folder / runner.MANIFEST).read_text())
    whole |= {"class": "Sum", "parameters": 3, "zeros": 0.25, "bytes": 9, "int8": False, "levels": 0}
    whole |= {"versions": {"onnx": "1"}, "sizes": {"sum.onnx": (folder / "sum.onnx").stat().st_size}}
    whole["graphs"]["model"]["inputs"][0]["at_most"] = {"0": 4}
    expected = FEED["ids"] + FEED["mask"]
    loaded = []

    @settings(max_examples=150, deadline=10_000, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data):
        info = json.loads(json.dumps(whole))
        for _ in range(data.draw(st.integers(1, 3))):
            change(info, data)
        (folder / runner.MANIFEST).write_text(json.dumps(info))
        try:
            (found,) = target.load(folder)(FEED).values()
        except DeployError:
            return
        np.testing.assert_array_equal(found, expected)
        loaded.append(info)

    holds()
    assert loaded


def test_every_port_that_export_writes_is_permitted(tmp_path):
    from secateur.deploy.target import Port
    from secateur.deploy.targets.inputs import as_json

    bound = Port("bound", "int32", ("batch",), "ids", high=5, at_most={0: 4})
    made = [bound, Port("flag", "bool", ("batch", 0), fill=True)]
    ports = [*PORTS, *map(as_json, made), as_json(Port("past", "float16", ("batch", 2, "past"), 0.5, low=-3))]
    graph = {"files": ["model.onnx"], "inputs": ports, "outputs": ["y"]}
    assert runner.read(describe(tmp_path, graphs={"model": graph}))["graphs"]["model"]["inputs"] == ports
