"""What is exported says the same as the model, and LiteRT's sparse format is smaller where there are many zeros."""

import keras
import numpy as np
import pytest

import secateur
from secateur.deploy import runner
from secateur.deploy.jobs import keras_jobs
from secateur.deploy.jobs.keras_table import bench, load
from secateur.keras.export import TARGETS, export
from tests.keras import models

pytestmark = pytest.mark.slow
BACKEND = keras.backend.backend()
X = np.random.default_rng(0).integers(1, models.VOCAB, (3, models.LENGTH)).astype("int32")
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


@pytest.mark.parametrize("target", [t for t, backends in TARGETS.items() if BACKEND in backends])
def test_a_shrunk_model_says_the_same(target, tmp_path):
    if target in PACKAGES:
        pytest.importorskip(PACKAGES[target])
    host = secateur.open(models.transformer(blocks=1))
    host.resize(secateur.prune(host, secateur.criteria.magnitude, secateur.Unit("head", "ffn"), 0.5))
    suffix = {"litert": ".tflite", "tflite": ".tflite", "onnx": ".onnx", "openvino": ".xml"}.get(target, "")
    path = export(host.model, tmp_path / f"m{suffix}", target, X)
    expected = host.outputs(X)[0]
    np.testing.assert_allclose(load(path, target)(X)[0], expected, rtol=0, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the converter is TensorFlow's")
def test_the_sparse_format_is_smaller(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 64)).astype("float32")
    layers = [keras.layers.Dense(256, activation="relu", name="up"), keras.layers.Dense(8, name="head")]
    model = models.randomized(keras.Sequential([keras.layers.Input((64,)), *layers]))
    secateur.keras.prune(model, pattern=secateur.Block(1, 4), sparsity=0.9)
    rows = bench({"m": model}, x, ["tflite"], tmp_path, sparse=["m"], repeats=1)
    plain, sparse = rows
    assert max(plain.difference, sparse.difference) < 1e-4
    assert sparse.bytes < 0.6 * plain.bytes


@pytest.mark.parametrize("target", ["keras", "saved_model"])
def test_what_may_touch_files_is_loaded_only_by_who_made_it(target, tmp_path, monkeypatch):
    if target != "keras" and BACKEND not in TARGETS[target]:
        pytest.skip(f"{target} is not written on this backend")
    monkeypatch.setattr(keras_jobs, "set_threads", lambda threads: None)  # TensorFlow runs already
    model = models.mlp()
    ports = keras_jobs.ports_of(model)
    feed = runner.made_up({"inputs": ports}, {"batch": 2})
    keras_jobs.write(model, target, tmp_path, ports, feed)
    with pytest.raises(runner.ArtefactError, match="pass ours={} if you made it"):
        runner.load(tmp_path)
    (found,) = runner.load(tmp_path, ours={})(feed).values()
    np.testing.assert_allclose(found, model.predict_on_batch(next(iter(feed.values()))), rtol=0, atol=1e-5)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert runner.verify_files(tmp_path) == len(files) - 1
    changed = max(files - {tmp_path / runner.MANIFEST}, key=lambda path: path.stat().st_size)
    changed.write_bytes(b"?" + changed.read_bytes()[1:])
    with pytest.raises(runner.ArtefactError, match="is not the file that was exported"):
        runner.verify_files(tmp_path)
