"""Kits: what they carry, and results read back."""

import json
import subprocess
import sys

import pytest

from secateur.deploy import runner
from secateur.deploy.jobs import kit
from secateur.deploy.jobs.bench import check_runtimes, names_of
from secateur.deploy.jobs.results import Timing, words
from secateur.deploy.target import DeployError

ROW = {"model": "a", "runtime": "onnx", "batch": 8, "length": 64, "median_ms": 4.0, "low_ms": 3.0, "high_ms": 5.0}
ROW |= {"startup_s": 0.5, "peak_bytes": 7}
RESULTS = {"format": 1, "kit": "k", "threads": 2, "machine": {"processor": "x"}}


def write(folder, rows, **changes):
    folder.mkdir(exist_ok=True)
    (folder / runner.RESULTS).write_text(json.dumps({**RESULTS, "rows": rows, **changes}))
    return folder


def test_results_read_back(tmp_path):
    rows = [ROW, {**ROW, "model": "b", "median_ms": 3.0}, {"model": "c", "runtime": "onnx", "batch": 8, "length": 64}]
    rows[2]["error"] = "no memory"
    folder = write(tmp_path / "kit", rows)
    sizes = {"onnx": {"b": {"bytes": 12, "zeros": 0.5}}}
    (folder / runner.KIT).write_text(json.dumps({"id": "k", "sizes": sizes}))
    found = kit.read_results(folder)
    assert [t.ratio for t in found.timings[:2]] == [1.0, 0.75]
    assert found.timings[1].bytes == 12
    assert found.timings[2].error == "no memory"
    assert found.threads == 2
    assert found.warnings == words(found.timings)
    assert "b has 50% zeros" in found.warnings[0]
    assert found.as_json()["rows"][2]["median_ms"] is None


def test_results_that_are_none(tmp_path):
    with pytest.raises(DeployError, match="run `python device.py` in the kit"):
        kit.read_results(tmp_path)
    with pytest.raises(DeployError, match="has format 3"):
        kit.read_results(write(tmp_path / "a", [], format=3))
    with pytest.raises(DeployError, match="is no result of a kit"):
        kit.read_results(write(tmp_path / "b", [{"model": "a"}]))
    folder = write(tmp_path / "c", [ROW])
    (folder / runner.KIT).write_text(json.dumps({"id": "other", "sizes": {}}))
    with pytest.raises(DeployError, match="come from another kit"):
        kit.read_results(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [{**ROW, "median_ms": -4.0}]}, r"rows\.0\.median_ms is -4\.0"),
        ({"rows": [{**ROW, "median_ms": 0}]}, r"rows\.0\.median_ms is 0"),
        ({"rows": [{**ROW, "median_ms": "4.0"}]}, r"rows\.0\.median_ms is '4\.0'"),
        ({"rows": [{**ROW, "low_ms": float("nan")}]}, "NaN is no number of JSON"),
        ({"rows": [{**ROW, "high_ms": None}]}, r"rows\.0\.high_ms is None"),
        ({"rows": [{**ROW, "high_ms": 3.5}]}, "in this order"),
        ({"rows": [{**ROW, "batch": 0}]}, r"rows\.0\.batch is 0"),
        ({"rows": [{**ROW, "runtime": ["onnx"]}]}, r"rows\.0\.runtime is \['onnx'\]"),
        ({"rows": [{**ROW, "peak_bytes": -7}]}, r"rows\.0\.peak_bytes is -7"),
        ({"rows": [{**ROW, "ratio": 9.0}]}, r"rows\.0\.ratio is 9\.0"),
        ({"rows": [{k: v for k, v in ROW.items() if k != "median_ms"}]}, "an error, or low_ms, median_ms"),
        ({"rows": {}}, "rows is {}"),
        ({"threads": "2"}, "threads is '2'"),
        ({"machine": []}, r"machine is \[\]"),
        ({"machine": {"processor": {"a": 1}}}, "machine.processor is"),
        ({"format": True}, "has format True"),
        ({"other": 1}, "other is 1"),
    ],
)
def test_damaged_results_are_one_sentence(tmp_path, changes, said):
    with pytest.raises(DeployError, match=said) as caught:
        kit.read_results(write(tmp_path / "kit", changes.pop("rows", [ROW]), **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "\ud800", '{"format": 1e999}', "{"])
def test_results_that_are_no_json(tmp_path, text):
    (tmp_path / runner.RESULTS).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DeployError, match=r"results\.json"):
        kit.read_results(tmp_path)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"id": "k"}, "sizes is"),
        ({"id": 7, "sizes": {}}, "id is 7"),
        ({"id": "k", "sizes": {"onnx": {"a": {"bytes": "12", "zeros": 0.5}}}}, r"sizes\.onnx\.a\.bytes is '12'"),
        ({"id": "k", "sizes": {"onnx": {"a": {"bytes": 12, "zeros": 1.5}}}}, r"sizes\.onnx\.a\.zeros is 1\.5"),
        ({"id": "k", "sizes": {"onnx": {"a": {"bytes": 1, "zeros": 0.5, "ratio": 0.1}}}}, r"a\.ratio is 0\.1"),
        ({"id": "k", "sizes": {}, "command": "x"}, "command is 'x'"),
    ],
)
def test_a_damaged_kit_is_one_sentence(tmp_path, described, said):
    folder = write(tmp_path / "kit", [ROW])
    (folder / runner.KIT).write_text(json.dumps(described))
    with pytest.raises(DeployError, match=said):
        kit.read_results(folder)


def test_words_about_zeros():
    sparse = Timing("s", "onnx", 8, 64, median_ms=2.0, ratio=0.99, zeros=0.8)
    assert words([sparse, Timing("d", "onnx", 8, 64, median_ms=2.0, ratio=1.0, zeros=0.01)]) == [
        "zeros bring nothing on onnx: s has 80% zeros, multiplied like any other weight; it takes 0.99 of the first "
        "model's time. Remove heads and neurons, or use the runtime secateur, which skips zeros"
    ]
    assert words([Timing("s", "secateur", 8, 64, median_ms=1.0, ratio=0.5, zeros=0.8)]) == []
    assert words([Timing("s", "onnx", 8, 64, zeros=0.8, error="refused")]) == []


def test_names_and_runtimes(tmp_path):
    for name in ("x/model", "y/model", "z"):
        (tmp_path / name).mkdir(parents=True)
    named = names_of([tmp_path / "x/model", tmp_path / "y/model", tmp_path / "z"])
    assert list(named) == [str(tmp_path / "x/model"), str(tmp_path / "y/model"), "z"]
    with pytest.raises(DeployError, match="is not a folder"):
        names_of([tmp_path / "absent"])
    assert check_runtimes(["pytorch", "torch"]) == ["torch"]
    with pytest.raises(DeployError, match="no runtime 'abacus'; there is torch, secateur, onnx"):
        check_runtimes(["abacus"])


@pytest.mark.slow
def test_a_kit_runs_without_secateur(artefact, tmp_path):
    refused = kit.write_kit([artefact.folder], tmp_path / "kit", ["onnx"], batch=[2], length=[9], turns=2)
    assert refused == []
    done = subprocess.run([sys.executable, "-I", "device.py"], cwd=tmp_path / "kit", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (timing,) = kit.read_results(tmp_path / "kit").timings
    assert timing.median_ms > 0
    assert timing.bytes == artefact.bytes
    with pytest.raises(DeployError, match="torch needs secateur on the device"):
        kit.write_kit([artefact.folder], tmp_path / "other", ["torch"])
