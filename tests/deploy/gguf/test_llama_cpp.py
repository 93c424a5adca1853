"""GGUF files on llama.cpp itself: it computes what PyTorch computes, whatever sizes pruning has left."""

import json
import urllib.request

import numpy as np
import pytest
import torch

from secateur.deploy import runner
from secateur.deploy.gguf.compare import CHAT, compare
from secateur.deploy.gguf.export import export_gguf
from secateur.deploy.gguf.generate import file_of, generate_text, is_gguf, speeds
from secateur.deploy.gguf.llama_cpp import running
from secateur.deploy.target import DeployError

from .models import TEXTS, byte_level, cut, decoder, greedy, sentencepiece

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("xllamacpp", reason="the extra gguf is not installed")

SIZES = [(2, 40), (1, 17), (2, 33)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def uneven(tokenizer, tmp_path_factory):
    """An uneven Llama, and its export in float32."""
    model = cut(decoder(tie_word_embeddings=True), SIZES)
    folder = tmp_path_factory.mktemp("gguf") / "uneven"
    return model, export_gguf(model, folder, quantize="f32", tokenizer=tokenizer)


def test_an_uneven_llama_computes_the_same(uneven):
    _, made = uneven
    assert made.parity.relative_error < 1e-5
    assert made.parity.agreement == 1.0
    info = json.loads((made.folder / runner.MANIFEST).read_text())
    assert info["gguf"]["architecture"] == "deci"
    assert runner.verify_files(made.folder) == 1


def test_it_writes_the_same_tokens(uneven, tokenizer):
    model, made = uneven
    prompt = tokenizer(TEXTS[0])["input_ids"]
    with running(file_of(made.folder)[0], 128) as llama:
        assert llama.tokens(TEXTS[0]) == prompt
        assert llama.complete(prompt, 16).tokens == greedy(model, prompt, 16)


def test_a_server_answers_a_conversation_by_the_models_own_template(tmp_path):
    template = (
        "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer, said = byte_level(chat_template=template), []
    made = export_gguf(decoder(layers=1), tmp_path / "out", quantize="f32", tokenizer=tokenizer, say=said.append)
    assert not any("chat template" in sentence for sentence in said)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    with running(file_of(made.folder)[0], 256) as llama:
        assert llama.chat_tokens(CHAT) == prompt
        request = json.dumps({"messages": CHAT, "temperature": 0, "max_tokens": 6}).encode()
        place = urllib.request.Request(
            llama.address + "/v1/chat/completions", request, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(place, timeout=60) as answer:
            got = json.loads(answer.read())
        assert got["usage"]["prompt_tokens"] == len(prompt)
        assert got["choices"][0]["message"]["content"] == llama.complete(prompt, 6, ends=True).text


def test_it_goes_on_with_texts_and_is_timed(uneven):
    _, made = uneven
    assert is_gguf(made.folder)
    (one,) = generate_text(made.folder, [TEXTS[1]], 5)
    assert 1 <= len(one.tokens) <= 5
    with pytest.raises(DeployError, match="do not fit the model, which takes from 1 to 128"):
        generate_text(made.folder, [TEXTS[1] * 20], 5)
    found = speeds({"a": made.folder, "b": made.folder}, 20, 4, turns=1)
    assert found["a"].prompt > 0 < found["b"].decode


def test_the_runner_gives_its_next_token(uneven, tokenizer):
    model, made = uneven
    ids = np.array([tokenizer(TEXTS[0])["input_ids"][:9], tokenizer(TEXTS[1])["input_ids"][:9]])
    found = runner.load(made.folder)({"input_ids": ids})[runner.NEXT]
    with torch.no_grad():
        assert found.tolist() == model(torch.tensor(ids)).logits[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("family", "options", "sizes"),
    [
        ("Mistral", {"sliding_window": 64}, None),
        ("Qwen2", {}, None),
        ("Qwen2", {}, SIZES),
        ("Llama", {}, [(2, 0), (1, 17), (2, 0)]),
        ("Llama", {}, [(0, 5), (0, 17), (1, 8)]),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, SIZES),
        (
            "Llama",
            {
                "rope_parameters": {
                    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
                    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
                }
            },
            SIZES,
        ),
    ],
    ids=["mistral", "qwen2", "uneven qwen2", "no neurons", "no attention", "biases", "scaled rotary"],
)
def test_families_and_traps(family, options, sizes, tokenizer, tmp_path):
    model = decoder(family, **options)
    model = model if sizes is None else cut(model, sizes)
    made = export_gguf(model, tmp_path / "out", quantize="f32", tokenizer=tokenizer)
    assert made.parity.relative_error < 1e-5


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_tokenizers_split_texts_alike(pre, tmp_path):
    tokenizer = sentencepiece() if pre == "sentencepiece" else byte_level(pre)
    made = export_gguf(decoder(layers=1, vocabulary=360), tmp_path / "out", quantize="f32", tokenizer=tokenizer)
    assert made.parity.relative_error < 1e-5  # which `export_gguf` reaches only where all samples agree


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_fewer_bits_are_smaller_and_close(name, tmp_path):
    said = []
    model = cut(decoder(layers=2, hidden_size=256), [(2, 40), (2, 256)])
    made = export_gguf(model, tmp_path / "out", quantize=name, tokenizer=byte_level(), say=said.append)
    bound = {"f16": 1e-2, "q8_0": 0.25}.get(name, 1.0)
    assert 1e-6 < made.parity.relative_error < bound
    assert made.bytes < 0.6 * 4 * made.parameters
    assert any("neurons of zeros" in sentence for sentence in said) == (name != "f16")


def test_wrong_weights_are_noticed_and_nothing_is_left(uneven, tokenizer, tmp_path, monkeypatch):
    from secateur.deploy.gguf import decoder as decoders

    monkeypatch.setattr(decoders, "interleaved", lambda tensor, heads: tensor)
    with pytest.raises(DeployError, match="llama.cpp differs from PyTorch by .* with f32 .*; nothing was written"):
        export_gguf(uneven[0], tmp_path / "place" / "out", tokenizer=tokenizer)
    assert not (tmp_path / "place").exists() or not list((tmp_path / "place").iterdir())


def test_another_tokenizer_is_noticed(uneven, tmp_path):
    with pytest.raises(DeployError, match="into other tokens"):
        compare(file_of(uneven[1].folder)[0], uneven[0], byte_level("qwen2", 300), 128)


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(DeployError, match=r"llama.cpp cannot run model.gguf"), running(tmp_path / "model.gguf", 64):
        pass
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(DeployError, match="is no GGUF file"), running(tmp_path / "model.gguf", 64):
        pass


def test_zeros_are_said_to_bring_nothing(tokenizer, tmp_path):
    model, said = decoder(layers=1), []
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
        model.model.layers[0].mlp.gate_proj.weight[:, ::2] = 0
        model.lm_head.weight[:, ::2] = 0
    export_gguf(model, tmp_path / "out", quantize="f32", tokenizer=tokenizer, say=said.append)
    assert any("of the weights are zeros, which bring nothing in llama.cpp" in sentence for sentence in said)
