"""What becomes a GGUF file, without llama.cpp: sizes, order of rows, types of numbers, tokenizers; what is refused."""

import numpy as np
import pytest
import torch

from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.compare import CHAT, chat_difference, divergence
from secateur.deploy.gguf.decoder import Layer, decoder_of, filled, interleaved, padded_heads, tensors
from secateur.deploy.gguf.vocabulary import BYTE, CONTROL, GIVEN, UNKNOWN, UNUSED, vocabulary_of
from secateur.deploy.target import DeployError

from ... import zoo
from .models import byte_level, cut, decoder, sentencepiece


def refused(model):
    with pytest.raises(DeployError) as caught:
        decoder_of(model)
    return str(caught.value)


def test_one_size_in_all_layers_stays_with_the_usual_architecture():
    assert decoder_of(decoder(layers=2)).architecture == "llama"
    assert decoder_of(decoder("Mistral", layers=2)).architecture == "llama"
    assert decoder_of(decoder("Qwen2", layers=2)).architecture == "qwen2"
    narrow = decoder_of(cut(decoder(layers=2), [(1, 20), (1, 20)]))
    assert (narrow.architecture, narrow.layers) == ("llama", [Layer(2, 1, 20)] * 2)


def test_other_sizes_in_each_layer_become_deci():
    found = decoder_of(cut(decoder("Qwen2", layers=3), [(2, 48), (1, 7), (0, 0)]))
    assert found.architecture == "deci"
    assert found.layers == [Layer(4, 2, 48), Layer(2, 1, 7), Layer(0, 0, 0)]
    assert padded_heads(found) == [Layer(4, 2, 48), Layer(2, 1, 7), Layer(0, 0, 1)]


def test_a_first_layer_without_attention_gets_a_head_of_zeros():
    found = decoder_of(cut(decoder(layers=2), [(0, 48), (1, 48)]))
    written = dict(tensors(found, padded_heads(found)))
    assert written["blk.0.attn_q.weight"].shape == (8, 32)
    assert written["blk.0.attn_output.weight"].shape == (32, 8)
    assert not written["blk.0.attn_output.weight"].any()


def test_rows_of_heads_are_interleaved():
    rows = torch.arange(12.0).reshape(12, 1)  # two heads of six: halves 0 1 2 and 3 4 5
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_zeros_fill_up_a_corner():
    assert filled(torch.ones(1, 2), (2, 3)).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert filled(None, (2,)).tolist() == [0, 0]


def test_rotary_frequencies_that_are_scaled_become_factors():
    rule = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    found = decoder_of(decoder(layers=1, rope_parameters=rule))
    assert found.factors.tolist() == pytest.approx([4.0] * 4)
    assert decoder_of(decoder(layers=1)).factors is None


def test_another_scale_of_attention_goes_into_the_queries():
    model = decoder("Qwen2", layers=2)
    weights = dict(model.named_parameters())
    model.model.layers[1].self_attn.scaling = 2 * 8**-0.5
    found = decoder_of(model).parameters
    for part in ("weight", "bias"):
        assert found[f"model.layers.0.self_attn.q_proj.{part}"] is weights[f"model.layers.0.self_attn.q_proj.{part}"]
        name = f"model.layers.1.self_attn.q_proj.{part}"
        torch.testing.assert_close(found[name], 2 * weights[name])


def test_a_sliding_window_cuts_the_context():
    found = decoder_of(decoder("Mistral", layers=1, sliding_window=40))
    assert found.context == 40
    assert "the context is cut from 128 to 40 tokens" in found.notes[0]
    assert decoder_of(decoder("Mistral", layers=1, sliding_window=None)).context == 128


def test_models_that_llama_cpp_does_not_have_are_refused_with_a_reason():
    assert "decoders of the families llama, mistral, qwen2 can; export it to onnx or openvino" in refused(zoo.bert())
    assert "MixtralForCausalLM cannot be written as GGUF" in refused(zoo.mixtral())
    assert "Qwen3ForCausalLM" in refused(decoder("Qwen3", layers=1))
    assert "llama.cpp's Llama computes SiLU, not gelu" in refused(decoder(layers=1, hidden_act="gelu"))
    rule = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    assert "of the kind dynamic; default, linear, llama3 are written" in refused(
        decoder(layers=1, rope_parameters=rule)
    )


def test_strange_parameters_and_heads_are_refused_with_a_reason():
    model = decoder(layers=1)
    model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(8)
    assert "llama.cpp's Llama has no model.layers.0.self_attn.q_norm.weight" in refused(model)
    uneven = decoder(layers=1)
    uneven.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.ones(24, 32))
    assert "layer 0 has 3 heads on 2 key-value heads" in refused(uneven)
    assert "no layer attends" in refused(cut(decoder(layers=1), [(0, 8)]))


# -- types of numbers -----------------------------------------------------------------------------------------------


def test_types_fall_back_where_rows_do_not_fit_blocks():
    assert quantise.fitting("Q4_K", 512) == "Q4_K"
    assert quantise.fitting("Q4_K", 288) == "Q5_0"
    assert quantise.fitting("Q6_K", 288) == "Q8_0"
    assert quantise.fitting("Q6_K", 10) == "F16"
    assert quantise.fitting("Q4_0", 33) == "F16"
    assert quantise.fitting("F32", 33) == "F32"


def test_a_mixture_stores_the_output_and_some_layers_better():
    shapes = {"token_embd.weight": (50, 256), "output_norm.weight": (256,)}
    for i in range(8):
        shapes |= {f"blk.{i}.attn_v.weight": (64, 256), f"blk.{i}.ffn_down.weight": (256, 512)}
    chosen = quantise.types(quantise.find("Q4_K_M"), shapes)
    assert (chosen["token_embd.weight"], chosen["output_norm.weight"]) == ("Q6_K", "F32")
    # the first eighth, the last eighth, and every third in between
    assert [i for i in range(8) if chosen[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == [0, 3, 6, 7]
    shapes["output.weight"] = (50, 256)
    assert quantise.types(quantise.find("q4_k_m"), shapes)["token_embd.weight"] == "Q4_K"


def test_neurons_fill_up_blocks_and_the_cost_is_said():
    layers = [Layer(4, 2, 40), Layer(4, 2, 64)]
    assert [layer.ffn for layer in quantise.filled_up(quantise.find("q4_0"), layers)] == [64, 64]
    assert quantise.filled_up(quantise.find("f16"), layers) == layers
    shapes = {"blk.0.attn_output.weight": (1000, 1000), "blk.1.attn_output.weight": (1000, 960)}
    said = quantise.words("q4_0", quantise.find("q4_0"), shapes, 24)
    assert "24 neurons of zeros fill up blocks of 32" in said[0]
    assert said[1].startswith(
        "rows of 1000 are no multiple of 32: 1 of 2 tensors are stored in larger types than q4_0 has"
    )
    assert said[1].endswith("which takes 1.4 MB more")  # 10^6 weights of 16 bits instead of 4.5
    (said,) = quantise.words("q4_k_m", quantise.find("q4_k_m"), {"blk.0.attn_q.weight": (1000, 960)}, 0)
    assert said.endswith("which takes 0.1 MB more")  # 5.5 bits instead of 4.5
    assert quantise.words("f16", quantise.find("f16"), {"blk.0.attn_output.weight": (1000, 1000)}, 0) == []


def test_an_unknown_format_is_refused():
    with pytest.raises(DeployError, match="no format 'q3' for GGUF; there is f32, f16, bf16, q8_0"):
        quantise.find("q3")


def test_numbers_are_rounded_as_the_reference_does():
    quants = pytest.importorskip("gguf").quants
    pytest.importorskip("xllamacpp")
    from gguf import GGMLQuantizationType as Kind

    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1"):
        expected = quants.quantize(values, Kind[kind])
        assert quantise.quantised(values, kind).tobytes() == expected.tobytes(), kind
    long = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    for kind, bound in (("Q6_K", 0.1), ("Q5_K", 0.2), ("Q4_K", 0.4)):  # the reference writes none of these
        back = quants.dequantize(quantise.quantised(long, kind), Kind[kind])
        assert 0 < np.abs(back - long).max() < bound, kind


def test_the_divergence_counts_the_other_tokens_as_one():
    # of shares 1/2, 1/4, 1/8, 1/8 against 1/4, 1/4, 1/4, 1/4: the last two together are 1/4 against 1/2
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(np.log([0.5, 0.25]), np.log([0.25, 0.25])) == pytest.approx(expected)
    assert divergence(np.log([0.5, 0.25]), np.log([0.5, 0.25])) == 0.0


# -- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_byte_level_tokenizer():
    tokenizer = byte_level("smollm")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    found = vocabulary_of(tokenizer, 330)
    assert (found.model, found.pre, found.template) == ("gpt2", "smollm", "{{ messages }}")
    assert found.special == {"bos": 1, "eos": 0}
    assert found.adds == {"bos": False, "eos": False}
    assert (found.tokens[0], found.kinds[0]) == ("<|end|>", CONTROL)
    assert (found.tokens[len(tokenizer) - 1], found.kinds[len(tokenizer) - 1]) == ("<tool>", GIVEN)
    assert (found.tokens[329], found.kinds[329]) == ("[PAD329]", UNUSED)
    assert all(len(pair.split(" ")) == 2 for pair in found.merges)


def test_a_sentencepiece_tokenizer():
    tokenizer = sentencepiece()
    found = vocabulary_of(tokenizer, 360)
    assert (found.model, found.space, found.merges) == ("llama", True, [])
    assert found.kinds[0] == UNKNOWN
    assert found.kinds[3:259] == [BYTE] * 256
    assert found.tokens[3 + ord("a")] == "<0x61>"
    assert sorted(score for score in found.scores if score)[-2:] == [-2.0, -1.0]  # of the first two merges


def test_tokenizers_that_llama_cpp_does_not_have_are_refused_with_a_reason():
    def said(tokenizer, size=400):
        with pytest.raises(DeployError, match="the tokenizer cannot be written as GGUF") as caught:
            vocabulary_of(tokenizer, size)
        return str(caught.value)

    from tokenizers import normalizers, pre_tokenizers

    from ...text_models import tokenizer_of

    assert "of the kind WordLevel" in said(tokenizer_of(["a"], "[PAD]", "[UNK]"))
    assert "and the model has embeddings for 9" in said(byte_level(), 9)
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "it changes texts first (Lowercase)" in said(lower)
    spaced = byte_level()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "by a rule that llama.cpp is not known to have; known are those of gpt-2, smollm" in said(spaced)
    assert "no tokenizer.json" in said(object())


# -- chat templates -------------------------------------------------------------------------------------------------


class Answers:
    """A llama.cpp that makes the same tokens of every conversation."""

    def __init__(self, tokens):
        self.tokens = tokens

    def chat_tokens(self, messages):
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        return self.tokens


def test_a_chat_template_that_llama_cpp_reads_otherwise_is_said():
    template = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
    tokenizer = byte_level(chat_template=template)
    text = "".join(f"<|start|>{message['content']}<|end|>" for message in CHAT)
    expected = tokenizer(text)["input_ids"]
    assert chat_difference(Answers(expected), tokenizer) == ""
    said = chat_difference(Answers(expected[:-1]), tokenizer)
    assert f"makes {len(expected) - 1} tokens of a conversation" in said
    assert chat_difference(Answers([]), byte_level()) == ""
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    assert chat_difference(Answers([]), tokenizer).endswith("does not go through it: one turn only")
