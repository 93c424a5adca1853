"""llama.cpp as the runtime of a search, on a tiny Llama: sizes that its blocks like, and what is refused at once."""

import json

import numpy as np
import pytest
import transformers

from secateur.cost import macs
from secateur.deploy import runner
from secateur.deploy.gguf.export import FILE, write_for_times
from secateur.deploy.gguf.generate import file_of, generate_text
from secateur.deploy.jobs import latency_table
from secateur.deploy.target import DeployError
from secateur.plan import Plan
from secateur.record import read_record
from secateur.search import costs, stages
from secateur.search.target import Call, Limit, Target, make_target
from secateur.search.walk import automatic as search
from tests.deploy.gguf.models import TEXTS, byte_level, decoder
from tests.search import rows as rows_of
from tests.search.test_automatic import made_up

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")

QUICK = {"heal_seconds": 0.0, "search_seconds": 0.0}
WIDTH = 128


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Host, task and rows of a Llama with a tokenizer that llama.cpp has."""
    home = tmp_path_factory.mktemp("llama")
    decoder(intermediate_size=WIDTH, vocabulary=320).save_pretrained(home / "model")
    byte_level().save_pretrained(home / "model")
    (home / "a.txt").write_text("\n".join(TEXTS * 16) + "\n")
    return rows_of.of_folder(home / "model", home / "a.txt", 48)


def as_macs(host):
    """A `measure` of the latency table and one of two models, in which times are as the multiply-accumulates."""
    dense = macs(host.layout)

    def of_sizes(made, *_):
        shares = {}
        for name, sizes in latency_table.wanted(host.layout, costs.POINTS, together=False).items():
            plan = Plan({axis: np.arange(size) for axis, size in sizes.items()})
            shares[name] = macs(host.layout, plan) / dense
        del shares[latency_table.DENSE]
        return shares, 10.0

    def of_folder(folder):
        keep = {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for number, layer in enumerate(model.model.layers):
            kv = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
            keep |= {f"L{number}.kv": np.arange(kv), f"L{number}.ffn": np.arange(layer.mlp.up_proj.out_features)}
        return macs(host.layout, Plan(keep)) / dense

    return of_sizes, made_up([of_folder])


def test_neurons_go_in_blocks_of_the_format_and_heads_as_before(opened):
    layout = opened[0].layout
    (neurons, *_), (groups, *_) = layout.of_kind("ffn"), layout.of_kind("kv")
    found = costs.allowed_sizes(layout, 1, 32)
    assert found[neurons.name].tolist() == [32, 64, 96, 128]
    assert found[groups.name].tolist() == [1, 2]
    assert costs.allowed_sizes(layout, 1, 256)[neurons.name].tolist() == list(range(1, 129))  # no block is full
    names = ("f16", "q8_0", "q4_0", "q4_k_m")
    assert [costs.block_of(make_target(2, "llama.cpp", quantize=name).call) for name in names] == [1, 32, 32, 256]
    assert costs.block_of(make_target(2, "onnx").call) == 1


def test_a_model_that_llama_cpp_does_not_have_is_refused_before_statistics_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Stages, "__init__", lambda *args, **options: pytest.fail("too late"))
    host, task, rows = rows_of.classifier(tmp_path)
    with pytest.raises(DeployError, match="BertForSequenceClassification cannot be written as GGUF: decoders of"):
        search(host, task, make_target(2, "llama.cpp"), rows, tmp_path / "out", **QUICK)
    (tmp_path / "words").mkdir()
    host, task, rows = rows_of.llama(tmp_path / "words")
    with pytest.raises(DeployError, match="the tokenizer cannot be written as GGUF"):
        search(host, task, make_target(2, "llama.cpp"), rows, tmp_path / "out", **QUICK)


def test_a_length_beyond_the_context_is_refused_before_statistics_are_made(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Stages, "__init__", lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(DeployError, match="calls of 128 tokens and the one that llama.cpp writes then do not fit"):
        search(*opened[:2], make_target(2, "llama.cpp"), opened[2], tmp_path / "out", **QUICK)


def test_a_file_for_times_runs_and_says_of_no_parity(opened, tmp_path):
    host, cut = opened[0], opened[0].copy()
    cut.resize(Plan({host.layout.of_kind("ffn")[0].name: np.arange(40)}))
    write_for_times(cut.model, byte_level(), tmp_path / "made", quantize="Q8_0")
    info = json.loads((tmp_path / "made" / runner.MANIFEST).read_text())
    assert "parity" not in info
    assert info["gguf"] == {"architecture": "deci", "type": "q8_0"}
    (chosen,) = runner.load(tmp_path / "made")({"input_ids": np.array([[5, 6, 7]])})[runner.NEXT]
    assert 0 <= chosen < 320


def test_the_table_is_measured_on_files_of_the_format(opened, tmp_path, monkeypatch):
    host = opened[0]
    call = make_target(2, "llama.cpp", quantize="q4_0", length=16).call
    seen = {}

    def times(made, *_):
        seen.update({name: json.loads((folder / runner.MANIFEST).read_text()) for name, folder in made.items()})
        return dict.fromkeys(made, 0.5), 10.0

    monkeypatch.setattr(latency_table, "measure", times)
    table = costs.table_of(host, call, cache=False)
    assert (table.runtime, table.length, table.dense_ms) == ("gguf", 16, 10.0)
    assert list(seen) == list(latency_table.wanted(host.layout, costs.POINTS, together=False))
    assert {info["gguf"]["type"] for info in seen.values()} == {"q4_0"}
    dense = seen.pop(latency_table.DENSE)
    assert all(info["bytes"] < dense["bytes"] for info in seen.values())


def test_a_search_keeps_whole_blocks_and_says_the_format(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    of_sizes, of_folders = as_macs(host)
    monkeypatch.setattr(latency_table, "measure", of_sizes)
    monkeypatch.setattr(latency_table, "artefacts", lambda *args: {})
    monkeypatch.setattr(stages, "measure", of_folders)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    found = search(host, task, make_target(1.3, "llama.cpp", length=32), rows, None, **QUICK)
    assert found.is_met
    kept = [found.best.candidate.kept.get(axis.name, 0) for axis in host.layout.of_kind("ffn")]
    assert sum(kept) < 3 * WIDTH
    assert all(count % 32 == 0 for count in kept)


@pytest.mark.slow
def test_a_search_on_llama_cpp_itself(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_table, "WITHIN", 0.5)
    real = stages.measure
    monkeypatch.setattr(stages, "measure", lambda *args, **options: real(*args, **options, within=0.5, most_s=1.0))
    call = Call("gguf", length=32, quantize="q4_0")
    limits = (Limit("latency", 9.0, call=call), Limit("params", 0.8))  # a latency that times of noise reach too
    found = search(host, task, Target(limits, call=call), rows, tmp_path / "out", **QUICK)
    assert found.is_met
    assert found.best.costs.keys() == {"latency@gguf", "params"}
    (times,) = found.best.measured.values()
    assert (times.runtime, times.quantize, times.length) == ("gguf", "q4_0", 32)
    assert times.ms > 0 < times.token_ms
    assert times.bytes < times.dense_bytes
    assert times.parity["relative_error"] <= times.parity["tolerance"]
    made = tmp_path / "out" / "gguf"
    assert file_of(made)[0].name == FILE
    assert runner.verify_files(made) >= 1
    (one,) = generate_text(made, [TEXTS[0]], 3)
    assert len(one.tokens) >= 1
    record = read_record(tmp_path / "out")
    assert [(speed.runtime, speed.what) for speed in record.speeds] == [("gguf", "prompt"), ("gguf", "token")]
    assert any("stored as q4_0" in note for note in record.notes)
    assert {"gguf", "xllamacpp"} <= record.provenance.versions.keys()
