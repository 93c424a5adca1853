"""Weights that a folder lacks, and sizes that its files cannot hold: errors, never random numbers."""

import json
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import ModelError
from secateur.torch.files import saving
from secateur.torch.open import load_model
from tests import zoo
from tests.torch.files.shrunk import edit, shrunk

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, message, *openers):
    for opener in openers or (load_model, saving.load, secateur.open):
        with pytest.raises(ModelError, match=message) as caught:
            opener(folder)
        assert "\n" not in str(caught.value)


@pytest.fixture
def stock(tmp_path):
    zoo.bert().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def uneven(tmp_path):
    saving.save(shrunk("bert"), tmp_path / "uneven")
    return tmp_path / "uneven"


@pytest.fixture
def packed(tmp_path):
    assert saving.save(zoo.pruned(zoo.bert(), only=lambda module: True), tmp_path / "packed", pack=True).packed
    return tmp_path / "packed"


def test_the_files_that_are_checked_are_those_that_transformers_opens(tmp_path):
    """A large shard beside the single file makes no room for what a config claims."""
    folder = tmp_path / "a"
    zoo.llama().save_pretrained(folder)
    save_file({"model.norm.weight": torch.zeros(2**23, dtype=torch.int8)}, folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert saving.check_folder(folder) == [folder / "model.safetensors"]
    edit(folder / "config.json", lambda c: c.update(intermediate_size=500_000))
    with pytest.raises(ModelError, match="describes a LlamaForCausalLM of"):
        load_model(folder)


def test_a_weight_that_a_stock_folder_lacks(stock):
    change_weights(stock, lambda state: state.pop(QUERY))
    refused(stock, rf"lacks {QUERY} \(1 tensor of BertForSequenceClassification\), which would be random; copy")
    change_weights(stock, lambda state: [state.pop(name) for name in list(state) if ".layer.2." in name])
    refused(
        stock, r"lacks bert\.\S+, bert\.\S+, bert\.\S+ and 14 more \(17 tensors of .*\), which would be random; copy"
    )


def test_a_weight_that_a_shrunk_folder_lacks(uneven):
    change_weights(uneven, lambda state: state.pop(QUERY))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained
    refused(uneven, rf"lacks {QUERY} \(1 tensor of BertForSequenceClassification\)", load_model, saving.load, theirs)


def test_a_packed_folder_whose_flag_was_removed(packed):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained
    edit(packed / "config.json", lambda data: data["quantization_config"].update(packed=False))
    refused(packed, "holds packed weights.*but its config says that none are", load_model, saving.load, theirs)
    edit(packed / "config.json", lambda data: data["quantization_config"].update(packed="false"))
    refused(packed, "'packed' is 'false'", load_model, saving.load, theirs)
    edit(packed / "config.json", lambda data: data.pop("quantization_config") and data.pop("transformers_weights"))
    refused(packed, "holds packed weights.*but its config says that none are")


def test_layers_beyond_those_of_the_config(stock):
    edit(stock / "config.json", lambda data: data.update(num_hidden_layers=2))
    refused(stock, r"holds 16 tensors that .* has no place for: bert.encoder.layer.2.*; copy")
    refused(stock, "has no place for", lambda folder: load_model(folder, task="AutoModel"))


def test_a_bias_for_which_the_config_has_no_place(tmp_path):
    zoo.build("llama", attention_bias=True).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda data: data.update(attention_bias=False))
    refused(tmp_path, r"has no place for: model.layers.0.self_attn.k_proj.bias")


def test_a_headless_class_leaves_the_head(stock):
    model = load_model(stock, task="AutoModel")
    assert type(model).__name__ == "BertModel"
    reference = zoo.bert()
    with torch.no_grad():
        ids = zoo.inputs(reference)
        assert torch.equal(model(**ids).last_hidden_state, reference.bert(**ids).last_hidden_state)


def test_a_new_head_is_made_on_request_only(tmp_path):
    zoo.build("bert", "BertForMaskedLM").save_pretrained(tmp_path)
    refused(
        tmp_path,
        r"lacks bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias and 1 more \(4 tensors of "
        r"BertForSequenceClassification\).*new_head=print",
        lambda folder: load_model(folder, task="SequenceClassification"),
    )
    new = []
    load_model(tmp_path, task="SequenceClassification", new_head=new.extend)
    assert new == ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    name = "bert.encoder.layer.0.output.dense.bias"
    change_weights(tmp_path, lambda state: state.pop(name))
    refused(
        tmp_path,
        rf"lacks {name} \(1 tensor of BertForSequenceClassification\), which would be random",
        lambda folder: load_model(folder, task="SequenceClassification", new_head=new.extend),
    )


def test_a_head_of_another_size_is_made_on_request_only(stock):
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    refused(stock, "classifier.bias", lambda folder: load_model(folder, **options))
    new = []
    assert load_model(stock, **options, new_head=new.extend).classifier.out_features == 5
    assert new == ["classifier.bias", "classifier.weight"]


def test_the_report_of_transformers_is_given_on_request(stock):
    model, report = saving.load(stock, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(zoo.logits(model), zoo.logits(zoo.bert()))


def test_tied_weights_and_buffers_are_not_missing(tmp_path):
    for family in ("llama", "gpt2", "t5", "albert", "siglip", "bart"):
        model = zoo.build(family)
        model.save_pretrained(tmp_path / family)
        loaded = load_model(tmp_path / family)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.fixture
def marian(tmp_path):
    """A folder without the sinusoidal positions, which the class computes and so does not save."""
    sizes = {**zoo.both_sides(1, 4, 48), "vocab_size": 50, "d_model": 32, "max_position_embeddings": 40}
    zoo.random_model("MarianMTModel", {**sizes, "pad_token_id": 0, "decoder_start_token_id": 0}).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_positions_that_a_class_computes_are_not_missing(marian):
    from secateur.torch.stream.lazy_model import Skeleton

    name = "encoder.embed_positions.weight"
    assert not any("positions" in entry for entry in load_file(marian / "model.safetensors"))
    wanted = load_model(marian).model.get_parameter(name)
    assert torch.equal(load_model(marian, task="MarianModel").get_parameter(name), wanted)
    skeleton = Skeleton(marian)
    skeleton.check(["model.encoder"])
    skeleton.load("model.encoder.embed_positions")
    assert torch.equal(skeleton.model.get_parameter(f"model.{name}"), wanted)
    change_weights(marian, lambda state: state.pop("model.encoder.layers.0.fc1.bias"))
    for load in (load_model, Skeleton):
        refused(marian, r"lacks model.encoder.layers.0.fc1.bias", load)


def test_what_is_trained_is_missing_though_it_starts_with_the_same_numbers(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 50}
    zoo.random_model("MambaForCausalLM", sizes).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda state: state.pop("backbone.layers.0.mixer.A_log"))
    refused(tmp_path, "lacks backbone.layers.0.mixer.A_log")


def test_positions_of_fewer_channels_are_saved(marian, tmp_path):
    host = secateur.open(load_model(marian))
    plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Unit("hidden"), 0.5)
    host.resize(plan)
    host.save(tmp_path / "narrow", plan)
    batch = zoo.inputs(host.model)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "narrow")(**batch).logits, host.model(**batch).logits)


# -- streaming --------------------------------------------------------------------------------------------------------


def test_a_streamed_folder_is_complete(tmp_path):
    from secateur.torch.stream.lazy_model import Skeleton

    zoo.build("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    Skeleton(tmp_path)
    edit(tmp_path / "config.json", lambda data: data.update(num_hidden_layers=2))
    refused(tmp_path, "has no place for: model.layers.2", Skeleton)
    change_weights(tmp_path, lambda state: state.pop("model.norm.weight"))
    refused(tmp_path, "lacks model.norm.weight", Skeleton)


# -- sizes ------------------------------------------------------------------------------------------------------------


def changes(folder, change):
    edit(folder / "config.json", lambda data: change(data["quantization_config"]["changes"]))


@pytest.mark.parametrize("positions", [[0, 0, 0], [1, 0], [0, 10**9], [-1], [2**40], "0"])
def test_positions_are_kept_once_and_in_order(positions, uneven):
    changes(uneven, lambda data: data.update(takes={"bert.embeddings.position_ids": [None, positions]}))
    theirs = transformers.BertForSequenceClassification.from_pretrained
    refused(uneven, "takes.*(twice or out of order|non-negative integers)|outside a dimension", load_model, theirs)


def test_positions_are_taken_from_computed_buffers_only(uneven):
    changes(uneven, lambda data: data.update(takes={"classifier.bias": [[0]]}))
    refused(uneven, "takes from classifier.bias, which is loaded and not computed", load_model, saving.load)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**6, "claims num_hidden_layers 1000000, but its files hold 57 tensors"),
        ("num_labels", 10**9, "claims num_labels 1000000000, but its files hold 57 tensors"),
        ("max_position_embeddings", 10**10, "describes a BertForSequenceClassification of 340000025362 elements, but"),
        ("vocab_size", 10**8, "describes a BertForSequenceClassification"),
    ],
)
def test_sizes_that_the_files_cannot_hold(key, value, message, stock):
    start = time.perf_counter()
    edit(stock / "config.json", lambda data: data.update({key: value}))
    refused(stock, message)
    assert time.perf_counter() - start < 3


def test_sizes_of_a_manifest_that_the_files_cannot_hold(uneven):
    start = time.perf_counter()
    base = {"": {"num_hidden_layers": 10**6}}
    changes(uneven, lambda data: data.update(base=base))
    refused(uneven, "claims num_hidden_layers 1000000")
    edit(uneven / "config.json", lambda data: data.update(max_position_embeddings=10**10))
    changes(uneven, lambda data: data.pop("base"))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained
    refused(uneven, "describes a BertForSequenceClassification", load_model, saving.load, theirs)
    assert time.perf_counter() - start < 3


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["AutoTokenizer"]}, "names no model class of transformers"),
        ({"architectures": ["PreTrainedTokenizerFast"]}, "names no model class of transformers"),
        ({"architectures": [3]}, "architectures.0 is 3"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel'"),
        ({"num_attention_heads": 2**70}, "does not fit 64 bits"),
        ({"hidden_size": "x"}, "cannot be loaded"),
        ({"hidden_size": -3}, "cannot be loaded|describes"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"id2label": 3}, "cannot be loaded"),
        ({"quantization_config": 3}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "secateur", "changes": 3}}, "changes are int"),
        ({"quantization_config": {"quant_method": ["secateur"]}}, "cannot be loaded"),
    ],
)
def test_a_config_with_wrong_values(change, message, stock):
    edit(stock / "config.json", lambda data: data.update(change))
    refused(stock, message, load_model, saving.load)


def test_a_deep_config(stock):
    (stock / "config.json").write_text('{"a": ' + "[" * 10**5)
    refused(stock, "nested more than 64 deep")


def test_infinite_numbers_of_a_config_are_taken(stock):
    edit(stock / "config.json", lambda data: data.update(time_step_limit=[0.0, float("inf")]))
    assert torch.equal(zoo.logits(load_model(stock)), zoo.logits(zoo.bert()))


@pytest.mark.parametrize(
    "weights",
    [{"a": ["x"]}, {"a": 3}, [], *({"a": name} for name in ("b/../model.safetensors", "m\0.safetensors", "..", ""))],
)
def test_a_wrong_index(weights, stock):
    (stock / "model.safetensors").rename(stock / "m.safetensors")
    (stock / saving.INDEX).write_text(json.dumps({"weight_map": weights}))
    refused(stock, "index.json (is damaged|points outside|lists no weights)")
