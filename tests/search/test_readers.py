"""A search for a server: only sizes that it reads are chosen, and models that it does not read are refused at once."""

from types import SimpleNamespace

import pytest
import transformers

import secateur
from secateur.deploy.decilm.export import check_decilm
from secateur.deploy.gguf.decoder import Layer, decoder_of
from secateur.deploy.target import DeployError
from secateur.errors import TargetError
from secateur.record import read_record
from secateur.search import stages
from secateur.search.build import RIDGES
from secateur.search.candidate import Candidate
from secateur.search.choosing.chooser import Chosen
from secateur.search.costs import params_cost
from secateur.search.levels import METHODS
from secateur.search.readers import check_reader, readable
from secateur.search.target import LLAMA_CPP, READERS, Limit, make_target
from secateur.search.walk import automatic as search
from secateur.search.walk import check_calls
from tests import zoo
from tests.deploy.gguf.models import TEXTS, byte_level, cut, decoder
from tests.search import rows as rows_of

QUICK = {"heal_seconds": 0.0, "search_seconds": 0.0}
WIDTH = 768


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Host, task and rows of a Llama whose layers are three blocks of neurons wide."""
    home = tmp_path_factory.mktemp("llama")
    decoder(layers=2, intermediate_size=WIDTH, vocabulary=320).save_pretrained(home / "model")
    byte_level().save_pretrained(home / "model")
    (home / "a.txt").write_text("\n".join(TEXTS * 16) + "\n")
    return rows_of.of_folder(home / "model", home / "a.txt", 48)


def test_neurons_go_in_blocks_and_heads_stay_where_a_server_reads_decilm(opened):
    layout = opened[0].layout
    cost = params_cost(layout, Limit("params", 0.5), 16)
    neurons, groups = layout.of_kind("ffn")[0].name, layout.of_kind("kv")[0].name
    for reader in ("vllm", "sglang", "mlx"):
        (found,) = readable([cost], layout, reader)
        assert found.allowed[neurons].tolist() == [256, 512, 768]
        assert found.allowed[groups].tolist() == [2]
        assert found.limit == cost.limit
    for reader in (LLAMA_CPP, None):
        (found,) = readable([cost], layout, reader)
        assert found.allowed[neurons].tolist() == list(range(16, 769, 16))
        assert found.allowed[groups].tolist() == [1, 2]


def test_a_width_that_is_no_multiple_stays_as_it_is():
    layout = secateur.open(decoder(layers=1, intermediate_size=300)).layout
    (found,) = readable([params_cost(layout, Limit("params", 0.9), 1)], layout, "vllm")
    assert found.allowed[layout.of_kind("ffn")[0].name].tolist() == [256, 300]


def test_what_a_server_does_not_read_is_refused_with_a_reason():
    for reader in READERS:
        check_reader(decoder(layers=2), reader)
        with pytest.raises(DeployError, match="BertForSequenceClassification cannot be written as"):
            check_reader(zoo.bert(), reader)
    check_reader(zoo.bert(), None)
    with pytest.raises(DeployError, match="differ in which layers have biases"):
        check_decilm(decoder(layers=1, attention_bias=True), "vllm")
    uneven = cut(decoder(layers=2), [(2, 48), (1, 48)])
    check_decilm(uneven, "vllm")
    with pytest.raises(DeployError, match="key-value heads differs by layer, which SGLang does not take"):
        check_decilm(uneven, "sglang")
    wide = decoder(layers=1, head_dim=16)
    check_decilm(wide, "sglang")
    with pytest.raises(DeployError, match="4 heads of 16 numbers are not the 32 of the residual stream"):
        check_decilm(wide, "mlx")


def test_a_search_chooses_what_vllm_reads(opened, tmp_path):
    host, task, rows = opened
    target = make_target(limits=["params<=0.7"], reader="vLLM")
    found = search(host, task, target, rows, tmp_path / "out", **QUICK)
    assert found.is_met
    kept, layout = found.best.candidate.kept, host.layout
    assert {layout.axis(axis).kind for axis in kept} <= {"ffn"}
    assert all(count % 256 == 0 for count in kept.values())
    assert kept or found.best.candidate.dropped
    sizes = decoder_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).layers
    assert all(layer == Layer(4, 2, layer.ffn) and layer.ffn % 256 == 0 for layer in sizes)
    asked = {one.what: one for one in read_record(tmp_path / "out").asked}
    assert (asked["sizes"].asked, asked["sizes"].is_met) == ("what vllm reads", True)


def test_a_model_that_a_server_does_not_read_is_refused_with_the_calls():
    host = SimpleNamespace(model=zoo.bert(), source=None)
    with pytest.raises(DeployError, match="BertForSequenceClassification cannot be written as DeciLM: decoders of"):
        check_calls(host, make_target(limits=["params<=0.5"], reader="sglang"))
    host = SimpleNamespace(model=decoder(layers=1), source=None)
    check_calls(host, make_target(limits=["params<=0.5"], reader="sglang"))


def test_a_result_that_its_server_does_not_read_is_not_written(opened, tmp_path, monkeypatch):
    host, task, rows = opened
    (groups, *_) = host.layout.of_kind("kv")
    monkeypatch.setattr(stages, "readable", lambda costs, layout, reader: tuple(costs))
    monkeypatch.setattr(
        stages.Stages,
        "met",
        lambda self, name, costs: (Chosen(Candidate({groups.name: 1}), METHODS[0], RIDGES[0], 0.0), costs),
    )
    target = make_target(limits=["params<=0.99"], reader="sglang")
    with pytest.raises(DeployError, match="key-value heads differs by layer, which SGLang does not take"):
        search(host, task, target, rows, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_servers_are_asked_for_by_name():
    assert make_target(2, "onnx", reader="MLX").reader == "mlx"
    assert make_target(2, "onnx").reader is None
    with pytest.raises(TargetError, match="no server 'vlm'; there is vllm, sglang, mlx, llama.cpp; did you mean"):
        make_target(2, "onnx", reader="vlm")
    with pytest.raises(TargetError, match="zeros are fast on secateur alone, and vllm multiplies them"):
        make_target(2, "secateur", zeros=True, reader="vllm")
