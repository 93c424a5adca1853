"""What travels to a device: descriptions, shapes, made-up inputs, workers; no runtime is needed."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from secateur.deploy import runner

PORTS = [
    {"name": "ids", "dtype": "int64", "shape": ["batch", "length"], "fill": "ids", "low": 3, "high": 9},
    {"name": "mask", "dtype": "int32", "shape": ["batch", "length"], "fill": 1},
    {"name": "image", "dtype": "float32", "shape": ["batch", 3, 2], "fill": "normal"},
]
GRAPH = {"files": [], "inputs": PORTS, "outputs": ["sum"]}
FEED = {"ids": np.array([[1, 2]]), "mask": np.array([[3, 4]])}


def write(folder, **changes):
    """An artefact for ONNX Runtime whose program gives `mask + ids`."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, TensorProto = onnx.helper, onnx.TensorProto
    folder.mkdir()
    ports = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("ids", "mask")]
    sums = helper.make_tensor_value_info("sum", TensorProto.INT64, ["batch", "length"])
    graph = helper.make_graph([helper.make_node("Add", ["ids", "mask"], ["sum"])], "sums", ports, [sums])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "sum.onnx")
    inputs = [PORTS[0], {**PORTS[1], "dtype": "int64"}]
    described = {"files": ["sum.onnx"], "inputs": inputs, "outputs": ["sum"]}
    info = {"format": 1, "target": "onnx", "graphs": {"model": described}, **changes}
    (folder / runner.MANIFEST).write_text(json.dumps(info))
    return folder


def test_inputs_are_made_up_by_their_ports():
    feed = runner.made_up(GRAPH, {"batch": 4, "length": 50})
    assert feed["ids"].shape == (4, 50)
    assert feed["ids"].dtype == np.int64
    assert set(np.unique(feed["ids"])) == set(range(3, 9))
    assert feed["mask"].dtype == np.int32
    assert (feed["mask"] == 1).all()
    assert feed["image"].shape == (4, 3, 2)
    assert abs(float(feed["image"].mean())) < 0.8 < float(feed["image"].std()) + 0.4


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        (["batch", 8], (2, 7), "ids has shape 2 x 7, but this made-up program takes batch x 8; export it"),
        (["batch", "length"], (2, 3, 4), "ids has shape 2 x 3 x 4"),
    ],
)
def test_shapes_that_do_not_fit(shape, given, said):
    graph = {**GRAPH, "inputs": [{**PORTS[0], "shape": shape}]}
    run = runner.checked(lambda feed: {}, graph, "made-up")
    with pytest.raises(runner.ArtefactError, match=said):
        run({"ids": np.zeros(given)})


def test_shapes_above_the_bound():
    graph = {**GRAPH, "inputs": [{**PORTS[0], "at_most": {"0": 4, "1": 6}}]}
    run = runner.checked(lambda feed: {"ok": feed["ids"]}, graph, "made-up")
    assert run({"ids": np.zeros((4, 6))})
    with pytest.raises(
        runner.ArtefactError, match="5 x 6, but this made-up program takes batch x length, at most 4 x 6"
    ):
        run({"ids": np.zeros((5, 6))})
    with pytest.raises(runner.ArtefactError, match="takes ids, which is not among other"):
        run({"other": np.zeros((1, 1))})


def test_folders_that_are_no_artefact(tmp_path):
    with pytest.raises(runner.ArtefactError, match=r"it has no artefact\.json"):
        runner.read(tmp_path)
    for number, (changes, said) in enumerate(
        [
            ({"format": 7}, "has format 7; this version reads 1"),
            ({"graphs": {"model": {**GRAPH, "files": ["gone.onnx"]}}}, r"gone\.onnx is missing; export it again"),
            ({"graphs": None}, "is damaged"),
            ({"sizes": {"artefact.json": 7}}, r"artefact\.json has \d+ bytes, not 7; export it again"),
        ]
    ):
        with pytest.raises(runner.ArtefactError, match=said):
            runner.read(write(tmp_path / str(number), **changes))
    folder = write(tmp_path / "cut")
    (folder / runner.MANIFEST).write_text("{")
    with pytest.raises(runner.ArtefactError, match="is damaged"):
        runner.read(folder)


def test_targets_and_graphs_that_are_unknown(tmp_path):
    with pytest.raises(runner.ArtefactError, match="is for 'abacus'; this version runs onnx, openvino"):
        runner.load(write(tmp_path / "a", target="abacus"))
    with pytest.raises(runner.ArtefactError, match="has no graph 'decode'; it has model"):
        runner.load(write(tmp_path / "b"), "decode")
    assert (runner.load(write(tmp_path / "c"))(FEED)["sum"] == [[4, 6]]).all()


@pytest.mark.parametrize("loader", ["shutil:rmtree", "rmtree", "load_sum", "secateur.deploy.jobs.torch_runtimes:load"])
def test_a_description_names_no_code(tmp_path, loader):
    folder = write(tmp_path / "a", loader=loader)
    with pytest.raises(runner.ArtefactError, match=f"is for '{loader}'; this version runs onnx"):
        runner.load(folder)
    assert folder.is_dir()


def test_a_program_of_keras_goes_by_position(tmp_path):
    ports = [{**PORTS[0], "name": "first"}, {**PORTS[1], "name": "second", "dtype": "int64"}]
    graph = {"files": ["sum.onnx"], "inputs": ports, "outputs": ["output_0"]}
    program = runner.load(write(tmp_path / "a", loader="keras program", graphs={"model": graph}))
    assert program({"second": FEED["mask"], "first": FEED["ids"]})["output_0"].tolist() == [[4, 6]]


def test_a_description_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"")
    for number, name in enumerate(("../other.onnx", str(tmp_path / "other.onnx"))):
        with pytest.raises(runner.ArtefactError, match="which lies outside"):
            runner.load(write(tmp_path / str(number), graphs={"model": {**GRAPH, "files": [name]}}))


def test_workers_take_turns_and_report(tmp_path):
    places = {"a": write(tmp_path / "a"), "b": write(tmp_path / "b"), "broken": write(tmp_path / "c", loader="abacus")}
    graph = {"files": ["sum.onnx"], "inputs": [PORTS[0]], "outputs": ["sum"]}
    places["decoder"] = write(tmp_path / "d", graphs={"decode": graph})
    found = runner.measure(places, 2, 5, threads=1, turns=2, runs=2)
    assert list(found) == ["a", "b", "broken", "decoder"]
    assert list(found["broken"]) == ["error"]
    assert found["decoder"] == {"error": f"{places['decoder']} has no graph 'model'; it has decode"}
    for name in ("a", "b"):
        row = found[name]
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["startup_s"] > 0
        assert row["peak_bytes"] > 1e6


def test_a_worker_that_hangs_at_its_start_is_ended(tmp_path, monkeypatch):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(600)\n")
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(runner, "__file__", str(sleeper))
    monkeypatch.setattr(runner, "START_LIMIT_S", 0.2)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1])
    found = runner.measure({"a": tmp_path / "a"}, 1, 2, threads=1)
    assert found == {
        "a": {
            "error": f"{tmp_path / 'a'} was not ready after 0.2 s, so its process was ended; export it again, or use a "
            "smaller model or a faster machine"
        }
    }
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_worker_that_is_ready_in_time_is_left_alone(tmp_path, monkeypatch):
    """The limit is on the start: the worker answers after it, too."""
    monkeypatch.setattr(runner, "START_LIMIT_S", 30)
    timers, timer = [], threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda *args: timers.append(timer(*args)) or timers[-1])
    worker = runner.Worker(write(tmp_path / "a"), 1, 2, 1)
    try:
        assert [t.finished.is_set() for t in timers] == [True]
        assert len(worker.time(2)) == 2
    finally:
        worker.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_stopped_worker_ends_with_who_started_it(tmp_path):
    write(tmp_path / "a")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(runner.__file__).parent)!r})
import runner
worker = runner.Worker({str(tmp_path / "a")!r}, 1, 2, 1)
print(worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        worker = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([worker], [], [], 10)
    os.close(worker)
    assert ended, "the worker is still there"


def test_the_script_needs_no_secateur(tmp_path):
    code = f"""
import sys
sys.modules["secateur"] = sys.modules["torch"] = None
sys.path.insert(0, {str(tmp_path)!r})
import shutil
shutil.copyfile({runner.__file__!r}, {str(tmp_path / "alone.py")!r})
import alone
assert alone.made_up({GRAPH!r}, {{"batch": 1, "length": 2}})["ids"].shape == (1, 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_an_exception_says_on_one_line():
    long = (
        "Exception from src/inference/core.cpp:132:\nException from src/plugin.cpp:59:\n  Unable to read\n the model."
    )
    assert runner.line(RuntimeError(long)) == "Unable to read the model"
    assert runner.line(ValueError()) == "ValueError"
    assert len(runner.line(ValueError("x" * 500))) == 240
