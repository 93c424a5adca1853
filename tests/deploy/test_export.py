"""Export: parity on each target, uneven models first; refusals that leave nothing behind."""

import errno
import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import secateur
from secateur.agreement import scale_of
from secateur.data.table import Table
from secateur.deploy import target
from secateur.deploy.jobs import bench, generation, material, parity
from secateur.deploy.jobs import export as exporting
from secateur.deploy.jobs.export import export
from secateur.deploy.target import DeployError, refusal
from secateur.errors import DataError, ModelError
from tests import zoo

SLOW = pytest.mark.slow
LACKING = {
    name: [p for p in packages if importlib.util.find_spec(p) is None]
    for name, packages in {
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "openvino": ["openvino"],
        "executorch": ["executorch"],
        "litert": ["litert_torch", "ai_edge_litert"],
    }.items()
}


def needs(name):
    return pytest.mark.skipif(bool(LACKING[name]), reason=f"{', '.join(LACKING[name])} is not installed")


def sizes(name, length=True):
    fixed = {"batch": 4, "length": 16} if length else {"batch": 4}
    return fixed if name in ("executorch", "litert") else {}


EACH = [pytest.param(name, marks=[needs(name), SLOW]) for name in target.TARGETS]


@pytest.mark.slow
def test_an_uneven_classifier_on_onnx_runtime(artefact, uneven, rows):
    assert artefact.parity.relative_error < 1e-5
    assert artefact.parity.agreement == 1.0
    assert artefact.parity.examples == len(rows)
    assert {shape.split(" x ")[0] for shape in artefact.parity.shapes} >= {"1", "3", "8"}
    assert artefact.zeros < 0.01
    files = {path.name: path for path in artefact.folder.iterdir()}
    assert {"artefact.json", "model.onnx", "tokenizer.json", "config.json"} <= files.keys()
    info = json.loads(files["artefact.json"].read_text())
    assert info["parity"]["relative_error"] == artefact.parity.relative_error
    assert info["bytes"] == sum(p.stat().st_size for n, p in files.items() if n.startswith("model.onnx"))
    assert info["sha256"].keys() == info["sizes"].keys() == set(info["graphs"]["model"]["files"])
    assert target.verify_files(artefact.folder) == len(info["sizes"])
    assert [port["name"] for port in info["graphs"]["model"]["inputs"]] == ["input_ids", "attention_mask"]
    program = target.load(artefact.folder)
    model = secateur.load(uneven).eval()
    ids = np.arange(4, 18).reshape(2, 7)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits.numpy()
    got = program({"input_ids": ids, "attention_mask": np.ones_like(ids), "left_out": ids})["logits"]
    assert np.abs(expected - got).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_a_damaged_program(artefact, tmp_path):
    import shutil

    folder = shutil.copytree(artefact.folder, tmp_path / "copy")
    (folder / "model.onnx").write_bytes(b"\x00 no protobuf")
    with pytest.raises(DeployError, match=r"is damaged: model\.onnx has 13 bytes, not \d+; export it again"):
        target.load(folder)
    (folder / "model.onnx").write_bytes(bytes((artefact.folder / "model.onnx").stat().st_size))
    with pytest.raises(DeployError, match=r"is damaged or not for this runtime \(onnx\)"):
        target.load(folder)
    with pytest.raises(DeployError, match="was exported without a cache"):
        generation.generate(artefact.folder, {"input_ids": np.ones((1, 3), np.int64)})


@pytest.mark.parametrize("name", EACH)
def test_uneven_on_every_target(name, uneven, rows, tmp_path):
    made = export(uneven, name, tmp_path / "out", data=rows, **sizes(name))
    assert made.parity.relative_error < 1e-4
    assert made.parity.agreement == 1.0
    described = json.loads((made.folder / "artefact.json").read_text())
    program = made.folder / described["graphs"]["model"]["files"][0]
    whole = program.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 3].ljust(len(whole), b"\0"), b""):
        program.write_bytes(damaged)
        (made.folder / "artefact.json").write_text(json.dumps({**described, "sizes": {}}))
        (timing,) = bench.bench([made.folder], [name], batch=[4], length=[16], turns=1).timings
        assert f"is damaged or not for this runtime ({name})" in timing.error
        assert "\n" not in timing.error


@pytest.mark.parametrize("name", EACH)
def test_images_on_every_target(name, tmp_path):
    made = export(zoo.vit(num_hidden_layers=1), name, tmp_path / "out", **sizes(name, length=False))
    assert made.parity.relative_error < 1e-4


@pytest.mark.parametrize("name", [pytest.param(n, marks=[needs(n), SLOW]) for n in ("onnx", "openvino")])
def test_generation_of_an_uneven_decoder(name, tmp_path):
    model = zoo.llama(num_hidden_layers=2)
    host = secateur.open(model)
    kv, ffn = host.layout.of_kind("kv"), host.layout.of_kind("ffn")
    host.resize(secateur.Plan({kv[0].name: np.array([0, 3]), kv[1].name: np.array([1]), ffn[1].name: np.arange(11)}))
    made = export(host.model, name, tmp_path / "out", generate=True)
    assert made.generation["equal"]
    assert made.generation["tokens"] == generation.NEW_TOKENS
    prompt = torch.tensor([[5, 9, 30, 7]])
    expected = host.model.generate(prompt, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(prompt))
    got = generation.generate(tmp_path / "out", {"input_ids": prompt.numpy()}, 9)
    assert got.tolist() == expected.tolist()


@SLOW
@needs("onnx")
def test_generation_of_an_encoder_decoder(tmp_path):
    model, _ = zoo.structure("whisper")
    made = export(model, "onnx", tmp_path / "out", generate=True)
    assert made.generation["equal"]
    assert sorted(json.loads((tmp_path / "out" / "artefact.json").read_text())["graphs"]) == [
        "decode",
        "encoder",
        "prefill",
    ]


@SLOW
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in ("onnx", "openvino")])
def test_eight_bits_on_top(name, uneven, rows, tmp_path):
    if name == "openvino":
        pytest.importorskip("nncf")
    small = export(uneven, name, tmp_path / "int8", data=rows, int8=True)
    assert 1e-4 < small.parity.relative_error < parity.INT8_TOLERANCE
    assert json.loads((tmp_path / "int8" / "artefact.json").read_text())["int8"] is True


def test_a_program_that_differs_is_refused(uneven):
    model = secateur.load(uneven).eval()
    program = fake_program(model)
    batch = {"input_ids": torch.arange(4, 14).reshape(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}

    def shifted(feed):
        return {name: value + 0.01 for name, value in program(feed).items()}

    assert parity.compare(model, program, [batch], 1e-6).relative_error == 0.0
    with pytest.raises(DeployError, match=r"differs from PyTorch by .* \(permitted: 1e-04\), at shapes 2 x 5"):
        parity.compare(model, shifted, [batch], 1e-4)
    small = {**batch, "input_ids": batch["input_ids"][:1, :2], "attention_mask": batch["attention_mask"][:1, :2]}
    together = parity.compare(model, shifted, [batch, small], 1.0)
    logits = [program({k: v.numpy() for k, v in b.items()})["logits"].ravel() for b in (batch, small)]
    assert together.worst_logit == pytest.approx(0.01, rel=1e-4)
    assert together.relative_error == pytest.approx(0.01 / scale_of(np.concatenate(logits)), rel=1e-4)
    many = [{name: value[:, :n] for name, value in batch.items()} for n in range(1, 6)]
    with pytest.raises(DeployError, match="at shapes 2 x 1, 2 x 2, 2 x 3 and 2 more; nothing was written"):
        parity.compare(model, shifted, many, 1e-4)
    with pytest.raises(DeployError, match="at least one batch"):
        parity.compare(model, program, [], 1e-4)
    with pytest.raises(DeployError, match="gives logits as None"):
        parity.compare(model, lambda feed: {}, [batch], 1e-4)


def fake_program(model):
    def run(feed):
        with torch.no_grad():
            return {"logits": model(**{k: torch.tensor(v) for k, v in feed.items()}).logits.numpy()}

    return run


def refused(tmp_path, *arguments, **options):
    with pytest.raises(DeployError) as caught:
        export(*arguments, tmp_path / "place" / "out", **options)
    assert not (tmp_path / "place").exists()
    return str(caught.value)


@pytest.fixture
def pretend(monkeypatch):
    """Targets whose packages need not be there, and which write nothing."""

    def find(name):
        real = {"onnx": "any", "executorch": "bounded", "litert": "fixed"}
        return target.Target(name, (), real[name], lambda graphs, folder, int8: pytest.fail("wrote"), name == "onnx")

    monkeypatch.setattr(exporting, "find", find)


def test_shapes_that_cannot_be(pretend, classifier, tmp_path):
    assert "onnx takes any batch and length" in refused(tmp_path, classifier, "onnx", batch=4)
    assert "length 65 is more than the 64 positions" in refused(tmp_path, classifier, "litert", length=65)
    assert "batch 0 is too small" in refused(tmp_path, classifier, "executorch", batch=0)
    assert "length 1 is too small" in refused(tmp_path, classifier, "executorch", length=1)
    assert "takes no tokens, so there is no length 9" in refused(tmp_path, zoo.vit(), "litert", length=9)


def test_wishes_that_cannot_be(pretend, classifier, tmp_path):
    assert "litert runs no generation" in refused(tmp_path, classifier, "litert", generate=True)
    assert "litert gets no 8-bit weights" in refused(tmp_path, classifier, "litert", int8=True)
    assert "BertForSequenceClassification does not generate" in refused(tmp_path, classifier, "onnx", generate=True)
    assert "weights of torch.bfloat16" in refused(tmp_path, zoo.bert().bfloat16(), "onnx")
    assert "tolerance nan is no number" in refused(tmp_path, classifier, "onnx", tolerance=float("nan"))
    with torch.device("meta"):
        assert "meta device" in refused(tmp_path, nn.Linear(2, 2), "onnx")


def test_a_disk_without_room(pretend, classifier, tmp_path, monkeypatch):
    usage = exporting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert "needs about 0 MB, and" in refused(tmp_path, classifier, "onnx")


def test_a_disk_that_fills_up(classifier, tmp_path, monkeypatch):
    def write(graphs, folder, int8):
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "find", lambda name: target.Target(name, (), "any", write))
    with pytest.raises(OSError, match="No space left"):
        export(classifier, "onnx", tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


def test_a_tokenizer_that_is_there_is_read(classifier, tmp_path):
    import shutil

    copy = shutil.copytree(classifier, tmp_path / "copy")
    assert exporting.tokenizer_of(copy).pad_token is not None
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="holds no tokenizer: "):
        exporting.tokenizer_of(copy)
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert exporting.tokenizer_of(copy) is None
    assert exporting.tokenizer_of("nobody/knows-this-model") is None


def test_the_sparse_runtime_fuses_activations(classifier, tmp_path, monkeypatch):
    from secateur import runtime
    from secateur.deploy.jobs import torch_runtimes as ours

    compiled = []

    def compile(model, **options):
        compiled.append(options)
        return model

    monkeypatch.setattr(runtime, "compile", compile)
    model = secateur.load(classifier).eval()
    ours.write(model, classifier, "secateur", tmp_path / "out")
    ids = np.arange(4, 18).reshape(2, 7)
    program = target.load(tmp_path / "out", ours={})
    for _ in range(2):
        got = program({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    with torch.inference_mode():
        assert np.allclose(got, model(input_ids=torch.tensor(ids)).logits.numpy(), atol=1e-6)
    (options,) = compiled
    assert options["tokens"] == 14
    assert options["example"]["input_ids"].tolist() == ids.tolist()


def test_data_that_does_not_fit(classifier):
    model = secateur.load(classifier)
    with pytest.raises(DeployError, match=r"need the model's tokenizer or other processor; pass processor="):
        material.read(model, Table({"text": ["a film"]}, "rows"), None)
    with pytest.raises(
        DataError, match=r"rows has no column text or .*; name the text with --text-column, one of film"
    ):
        material.read(model, Table({"film": ["a film"]}, "rows"), classifier)
    with pytest.raises(ModelError, match="a ViTModel reads pixel_values, not texts"):
        material.read(transformers.ViTModel(zoo.vit().config), Table({"text": ["a film"]}, "rows"), classifier)
    with pytest.raises(DeployError, match="the data is empty; pass at least one batch"):
        material.read(model, [], None)
    with pytest.raises(DataError, match="'input_ids' is no batch; pass a list of batches"):
        material.read(model, {"input_ids": torch.ones(1, 2)}, None)


class Odd(nn.Module):
    """A model with an operation that no target has."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return {"y": torch.special.bessel_j1(self.up(x))}


@pytest.mark.parametrize("name", EACH)
def test_an_operation_that_lacks_is_named(name, tmp_path):
    model = Odd().train()
    said = refused(tmp_path, model, name, example={"x": torch.randn(2, 4)}, **sizes(name, length=False))
    assert "bessel_j1, which Odd uses; choose another target" in said
    assert said.startswith(f"{name} has no ")
    assert all(module.training for module in model.modules())


def test_refusals_name_the_operation():
    for text in (
        "No ONNX function found for <OpOverload(op='aten.foo', overload='default')>. Failure message: none",
        "Operator torch._ops.aten.foo.default is not in Core ATen opset",
        "No conversion rule found for operations: aten.foo.default",
    ):
        error = RuntimeError("the export failed")
        error.__cause__ = RuntimeError(text)
        assert str(refusal("onnx", Odd(), error)).startswith("onnx has no aten.foo, which Odd uses")
    said = str(refusal("onnx", Odd(), ValueError("shapes\n  clash.")))
    assert said == "Odd cannot be written for onnx (ValueError: shapes clash); choose another target"


def test_unknown_and_missing_targets(classifier, tmp_path, monkeypatch):
    assert "no target 'tensorrt'; there is onnx, openvino, executorch, litert" in refused(
        tmp_path, classifier, "tensorrt"
    )
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    assert refused(tmp_path, classifier, "onnx") == "onnx is not installed; `pip install 'secateur[onnx]'`"
    assert bench.installed() == ["torch", "secateur"]


@pytest.mark.slow
@SLOW
@needs("onnx")
def test_bench_of_dense_and_uneven(classifier, uneven, artefact):
    found = bench.bench([classifier, uneven], ["torch", "onnxruntime"], batch=[2], length=[9], turns=2)
    assert [(t.runtime, t.model) for t in found.timings] == [
        ("torch", "dense"),
        ("torch", "uneven"),
        ("onnx", "dense"),
        ("onnx", "uneven"),
    ]
    assert all(t.error == "" and t.median_ms > 0 and t.bytes > 0 and t.peak_bytes > 0 for t in found.timings)
    assert [t.ratio for t in found.timings[::2]] == [1.0, 1.0]
    (other,) = bench.bench([artefact.folder], ["torch"], batch=[2], length=[9], turns=1).timings
    assert "is an artefact for onnx" in other.error
