"""`export --to decilm`."""

import numpy as np
import pytest

pytest.importorskip("torch")
import secateur
from tests.deploy.gguf.models import byte_level, decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose second layer has fewer neurons, and its tokenizer."""
    host = secateur.open(decoder(layers=2))
    name = host.layout.of_kind("ffn")[1].name
    plan = secateur.Plan({name: np.arange(17)}).check(host.layout)
    host.resize(plan)
    place = tmp_path_factory.mktemp("decoder") / "decoder"
    host.save(place, plan, tokenizer=byte_level())
    return place


def test_a_pruned_folder_is_written_with_its_tokenizer(result, folder, tmp_path):
    made = result("export", folder, "--to", "decilm", "--exact-widths", "--output", tmp_path / "out")
    assert made["target"] == "decilm"
    assert made["parity"]["relative_error"] < 1e-5
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_what_belongs_to_other_targets_is_refused(refused, folder, place):
    arguments = ["export", folder, "--output", place / "out", "--to"]
    assert "--int8 has no meaning in an export to DeciLM" in refused(*arguments, "decilm", "--int8")
    assert "--exact-widths has no meaning in an export to GGUF" in refused(*arguments, "gguf", "--exact-widths")
