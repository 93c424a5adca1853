"""A decoder as a DeciLM folder: what config.json says, what is filled up, that it reads back, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from secateur.deploy import export_decilm, register_decilm
from secateur.deploy.decilm import blocks
from secateur.deploy.decilm.export import compare, narrowest
from secateur.deploy.gguf.decoder import Layer, decoder_of
from secateur.deploy.target import DeployError

from ... import zoo
from ..gguf.models import byte_level, cut, decoder


def read(model):
    return decoder_of(model, blocks.FORM)


def refused(model):
    with pytest.raises(DeployError) as caught:
        export_decilm(model, "never")
    return str(caught.value)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Layers of other sizes: whole, one group and a few neurons, no feed-forward module, no attention."""
    folder, said = tmp_path_factory.mktemp("decilm") / "uneven", []
    rule = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    model = cut(decoder(layers=4, intermediate_size=300, rope_parameters=rule), [(2, 48), (1, 7), (2, 0), (0, 300)])
    made = export_decilm(model, folder, tokenizer=byte_level(), say=said.append)
    return model, folder, made, said


def test_a_folder_with_sizes_by_layer_reads_back_equal(uneven):
    _, folder, made, _ = uneven
    assert made.parity.relative_error < 1e-5
    assert made.parity.agreement == 1.0
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert config["num_attention_heads"] == 4
    attention, ffn = zip(*((block["attention"], block["ffn"]) for block in config["block_configs"]), strict=True)
    assert [part["no_op"] for part in attention] == [False, False, False, True]
    assert [part["n_heads_in_group"] for part in attention] == [2, 4, 2, None]
    assert [part["no_op"] for part in ffn] == [False, False, True, False]
    assert [part["ffn_mult"] for part in ffn] == [12.0, 12.0, None, 24.0]  # 3 / 2 of 256 / 32 and of 512 / 32
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["rope_theta"] == 100.0
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.py"))


def test_the_command_says_what_is_filled_up(uneven):
    text = " ".join(uneven[3])
    assert "669 neurons of zeros" in text  # 256 - 48, 256 - 7, 512 - 300
    assert "2 query heads and 0 key-value heads of zeros fill layers up to 4 query heads" in text
    assert "differs by layer, which SGLang refuses" in text


def test_a_damaged_folder_is_noticed(uneven, tmp_path):
    model, folder, _, _ = uneven
    values = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def place(values, **changes):
        save_file(values, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path

    swapped = {**values, "model.layers.0.mlp.up_proj.weight": values["model.layers.0.mlp.gate_proj.weight"].clone()}
    with pytest.raises(DeployError, match="the folder read back differs from PyTorch"):
        compare(model, place(swapped), 128, 1e-5)
    with pytest.raises(DeployError, match="the folder read back differs from PyTorch"):
        compare(model, place(values, rope_scaling=None), 128, 1e-5)
    with pytest.raises(DeployError, match="tensors of other shapes than config.json says for model.layers.0.self_attn"):
        compare(model, place(values, num_attention_heads=8), 128, 1e-5)
    with pytest.raises(DeployError, match="has more, which config.json does not know"):
        compare(model, place({**values, "more": torch.ones(1)}), 128, 1e-5)
    with pytest.raises(DeployError, match="has no tensor model.norm.weight"):
        compare(model, place({k: v for k, v in values.items() if k != "model.norm.weight"}), 128, 1e-5)


def test_transformers_opens_the_config_once_the_class_is_registered(uneven):
    register_decilm()
    config = AutoConfig.from_pretrained(uneven[1])
    assert [block.attention.no_op for block in config.block_configs] == [False, False, False, True]
    assert config.block_configs[3].ffn.ffn_mult == 24.0
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    assert config.to_dict()["block_configs"] == json.loads((uneven[1] / "config.json").read_text())["block_configs"]


def test_exact_widths_are_said_as_they_are(tmp_path):
    model = cut(decoder("Mistral", layers=2, tie_word_embeddings=True), [(1, 20), (1, 7)])
    made = export_decilm(model, tmp_path / "out", exact_widths=True)
    assert made.parity.relative_error < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["ffn"] for block in config["block_configs"]] == [
        {"no_op": False, "replace_with_linear": False, "intermediate_size": width} for width in (20, 7)
    ]
    assert config["num_attention_heads"] == 2
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_first_layer_without_attention_gets_heads_of_zeros(tmp_path):
    model = cut(decoder(layers=2), [(0, 48), (2, 48)])
    assert blocks.fitted(read(model)) == [Layer(4, 2, 256)] * 2
    assert export_decilm(model, tmp_path / "out").parity.relative_error < 1e-5
    assert not load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].any()


def test_query_heads_stay_with_their_key_value_head(tmp_path):
    model = decoder(layers=2, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, attention_bias=False)
    cut(model, [(3, 48), (2, 48)])
    assert blocks.fitted(read(model)) == [Layer(6, 3, 256), Layer(6, 2, 256)]  # groups of 2 become groups of 3
    assert export_decilm(model, tmp_path / "out").parity.relative_error < 1e-5
    wide = decoder(layers=2, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    cut(wide, [(4, 48), (3, 48)])
    assert blocks.fitted(read(wide))[1] == Layer(8, 4, 256)  # 3 do not divide 8
    assert export_decilm(wide, tmp_path / "wide").parity.relative_error < 1e-5


def test_key_value_heads_that_cannot_be_filled_up_are_refused():
    model = read(decoder(layers=2))
    object.__setattr__(model, "layers", [Layer(5, 1, 48), Layer(4, 2, 48)])
    with pytest.raises(DeployError, match="layer 1 has 4 query heads on 2 key-value heads, which cannot be filled up"):
        blocks.fitted(model)


@pytest.mark.parametrize("hidden", [32, 48, 576, 2048, 3072, 5120, 16384])
def test_every_multiple_of_256_can_be_said(hidden):
    widths = [256 * i for i in range(1, 300)]
    assert [blocks.width_of(blocks.ffn_mult(width, hidden), hidden) for width in widths] == widths


def test_numbers_of_16_bits_stay_in_16_bits():
    assert narrowest([torch.ones(2), torch.tensor([1e30]).bfloat16().float()]) == torch.bfloat16
    assert narrowest([torch.tensor([1 + 2**-10])]) == torch.float16
    assert narrowest([torch.tensor([0.1])]) == torch.float32


def test_models_that_decilm_does_not_have_are_refused_with_a_reason():
    assert "MixtralForCausalLM cannot be written as DeciLM: decoders of the families llama, mistral can" in refused(
        zoo.mixtral()
    )
    assert "Qwen3ForCausalLM cannot be written as DeciLM" in refused(decoder("Qwen3", layers=1))
    assert "the model has model.layers.0.self_attn.q_proj.bias" in refused(decoder(layers=1, attention_bias=True))
    normed = decoder(layers=1)
    normed.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(8)
    assert "DeciLM's Llama has no model.layers.0.self_attn.q_norm.weight" in refused(normed)
    narrow = decoder(layers=1)
    narrow.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(torch.ones(8, 32))
    assert "8 numbers for queries and keys and 4 for values" in refused(narrow)
    turned = decoder(layers=1)
    turned.model.rotary_emb.inv_freq.mul_(0.5)
    assert "its heads turn at other frequencies than its base gives; prune whole heads" in refused(turned)
