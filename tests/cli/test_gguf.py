"""`export --to gguf`, and `run` and `bench` of what it wrote."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import secateur
from tests.deploy.gguf.models import byte_level, decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with another size in each layer, and its tokenizer."""
    host = secateur.open(decoder(layers=2))
    first, second = host.layout.of_kind("ffn")
    plan = secateur.Plan({first.name: np.arange(17), second.name: np.arange(5, 45)}).check(host.layout)
    host.resize(plan)
    place = tmp_path_factory.mktemp("decoder") / "decoder"
    host.save(place, plan, tokenizer=byte_level())
    return place


def test_what_belongs_to_other_targets_is_refused(refused, folder, place):
    arguments = ["export", folder, "--to", "gguf", "--output", place / "out"]
    assert "--int8 has no meaning in an export to GGUF" in refused(*arguments, "--int8")
    assert "--batch has no meaning in an export to GGUF" in refused(*arguments, "--batch", 1)
    other = ["export", folder, "--to", "onnx", "--output", place / "out"]
    assert "--quantize has no meaning in a run on a PyTorch model" in refused(*other, "--quantize", "f16")


def test_an_unknown_format_and_an_encoder_are_refused(refused, folder, encoder, place):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    arguments = ["--to", "gguf", "--output", place / "out"]
    assert "no format 'q3' for GGUF; there is f32" in refused("export", folder, *arguments, "--quantize", "q3")
    assert "BertModel cannot be written as GGUF" in refused("export", encoder, *arguments)


def test_export_run_and_bench(result, folder, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    out = tmp_path / "out"
    made = result("export", folder, "--to", "gguf", "--quantize", "q8_0", "--output", out)
    assert made["target"] == "gguf"
    assert made["parity"]["relative_error"] < 0.1
    (answer,) = result("run", out, "the quick", "--new-tokens", 3)["answers"]
    assert answer["input"] == "the quick"
    assert isinstance(answer["generated"], str)
    arguments = ["--runtime", "llama.cpp", "--batch", 1, "--length", 8, "--turns", 2]
    (row,) = result("bench", out, *arguments)["rows"]
    assert row["error"] == ""
    assert row["median_ms"] > 0
