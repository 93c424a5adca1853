"""Bad input of `export` and `bench`: one sentence, exit code 2, and nothing written."""

import json

import pytest

torch = pytest.importorskip("torch")


def test_export_of_what_cannot_be(refused, classifier, place, tmp_path):
    out = place / "out"
    assert "no target 'tensorrt'; there is onnx" in refused("export", classifier, "--to", "tensorrt", "--output", out)
    assert "does not exist" in refused("export", tmp_path / "absent", "--to", "onnx", "--output", out)
    assert "no data at" in refused(
        "export", classifier, "--to", "onnx", "--output", out, "--data", tmp_path / "absent.csv"
    )
    assert "Missing option '--to'" in refused("export", classifier, "--output", out)
    (place / "there").mkdir()
    assert "exists; choose another output" in refused("export", classifier, "--to", "onnx", "--output", place / "there")


def test_export_of_shapes_that_cannot_be(refused, classifier, place):
    pytest.importorskip("onnxruntime")
    arguments = ["export", classifier, "--to", "onnx", "--output", place / "out"]
    assert "onnx takes any batch and length; leave out" in refused(*arguments, "--batch", 4)
    assert "does not generate; leave out generate" in refused(*arguments, "--generate")
    assert "tolerance -1.0 is no number from 0" in refused(*arguments, "--tolerance", "-1")


def test_export_to_a_disk_without_room(refused, classifier, place, monkeypatch):
    pytest.importorskip("onnxruntime")
    from secateur.deploy.jobs import export
    from secateur.deploy.targets import onnx_target

    arguments = ["export", classifier, "--to", "onnx", "--output", place / "out"]
    usage = export.shutil.disk_usage(place)

    def full(*wanted):
        monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        raise RuntimeError("LLVM ERROR: IO failure on output stream")

    monkeypatch.setattr(onnx_target.transformers_exporter, "write", full)
    assert "no space is left beside" in refused(*arguments)
    assert "has 0 MB left; make room or choose another output" in refused(*arguments)


def test_bench_of_a_damaged_artefact(refused, call, place):
    pytest.importorskip("onnxruntime")
    folder = place / "artefact"
    folder.mkdir()
    (folder / "artefact.json").write_text("{")
    done = call("bench", folder, "--runtime", "onnx")
    assert done.code == 2
    assert "nothing could be timed" in done.err
    assert "artefact.json is damaged (JSONDecodeError" in done.out
    assert "Traceback" not in done.out + done.err


def test_bench_of_a_changed_artefact(refused, place):
    pytest.importorskip("onnxruntime")
    folder = place / "artefact"
    folder.mkdir()
    port = {"name": "x", "dtype": "float32", "shape": ["batch", 4], "fill": "normal"}
    info = {"format": 1, "target": "onnx", "graphs": {"model": {"files": ["m.onnx"], "inputs": [port], "outputs": []}}}
    (folder / "m.onnx").write_bytes(b"changed")
    (folder / "artefact.json").write_text(json.dumps({**info, "sha256": {"m.onnx": "0" * 64}}))
    sentence = refused("bench", folder, "--runtime", "onnx", "--check")
    assert "m.onnx is not the file that was exported; export it again" in sentence
    assert "--check has no meaning" in refused("bench", "--results", folder, "--check")


def test_export_without_the_runtime(refused, classifier, place, monkeypatch):
    from secateur.deploy import target

    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    sentence = refused("export", classifier, "--to", "litert", "--output", place / "out")
    assert sentence == "litert_torch is not installed; `pip install 'secateur[litert]'`"


def test_bench_of_what_cannot_be(refused, classifier, tmp_path, place):
    assert "which models?" in refused("bench")
    assert "is not a folder; pass saved models" in refused("bench", tmp_path / "absent")
    assert "no runtime 'abacus'; there is torch" in refused("bench", classifier, "--runtime", "abacus")
    assert "--batch '1,x' is not a list of whole numbers" in refused("bench", classifier, "--batch", "1,x")
    assert "--length '0' is not a list" in refused("bench", classifier, "--length", "0")
    assert "leave out models" in refused("bench", classifier, "--results", tmp_path)
    assert "run `python device.py` in the kit" in refused("bench", "--results", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": 1}))
    assert "is no result of a kit" in refused("bench", "--results", tmp_path)
    (place / "plot.png").write_text("mine")
    assert "exists; choose another output" in refused("bench", classifier, "--plot", place / "plot.png")
    kit = ["bench", classifier, "--runtime", "torch", "--export-kit", place / "kit"]
    assert "torch needs secateur on the device" in refused(*kit)


@pytest.mark.slow
def test_results_of_a_kit(call, tmp_path, place):
    row = {"model": "a", "runtime": "onnx", "batch": 8, "length": 64, "median_ms": 4.0, "low_ms": 3.0, "high_ms": 5.0}
    data = {"format": 1, "kit": "k", "threads": 2, "machine": {"processor": "x"}}
    fast = {"model": "b", "median_ms": 2.0, "low_ms": 1.9, "high_ms": 2.2}
    rows = [row, {**row, **fast}, {**row, "model": "c", "error": "no memory"}]
    (tmp_path / "results.json").write_text(json.dumps({**data, "rows": rows}))
    done = call("bench", "--results", tmp_path, "--plot", place / "plot.png")
    assert done.code == 0, done.err
    assert "0.50" in done.out
    assert "onnx, c, 8 x 64: no memory" in done.out
    assert (place / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = json.loads(call("bench", "--results", tmp_path, "--json").out)
    assert [r["ratio"] for r in printed["rows"]] == [1.0, 0.5, None]
