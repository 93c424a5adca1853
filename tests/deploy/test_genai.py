"""genai_config.json: what it says of a decoder by hand, which ones get none and why, and the same tokens on GenAI."""

import importlib.util
import json

import pytest

from secateur.deploy import runner
from secateur.deploy.jobs.export import export
from secateur.deploy.jobs.generation import PAST, PRESENT, generate, write_genai
from secateur.deploy.targets.genai import FILE

from .gguf.models import TEXTS, byte_level, cut, decoder, greedy


def described(*sizes, **ports):
    """The description of an artefact: (key-value heads, size of keys, size of values) of each layer with a cache."""
    shapes = {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    for i, (heads, key, value) in enumerate(sizes):
        for part, size in (("keys", key), ("values", value)):
            shapes[f"{PAST}past_key_values.layers.{i}.{part}"] = ["batch", heads, "past", size]
    inputs = [{"name": name, "shape": shape, "dtype": "int64"} for name, shape in {**shapes, **ports}.items()]
    outputs = ["logits", *(PRESENT + name.removeprefix(PAST) for name in shapes if name.startswith(PAST))]
    graph = {"files": ["decode.onnx", "decode.onnx.data"], "inputs": inputs, "outputs": outputs}
    return {"target": "onnx", "graphs": {"decode": graph}, "generation": {"start": None, "end": [7, 9], "pad": 9}}


@pytest.fixture(scope="module")
def model():
    return decoder(layers=2)


def refused(model, info, folder):
    (reason,) = write_genai(model, info, folder)
    assert not (folder / FILE).exists()
    assert reason.startswith("no genai_config.json is written for ONNX Runtime GenAI: ")
    return reason


def test_the_file_says_names_sizes_and_where_a_text_ends(model, tmp_path):
    model.generation_config.update(bos_token_id=5, temperature=0.7, top_k=None)
    assert write_genai(model, described((2, 8, 8), (1, 8, 8)), tmp_path) == []
    written = json.loads((tmp_path / FILE).read_text())
    assert written["model"] == {
        "type": "decoder",
        "vocab_size": 330,
        "context_length": 128,
        "bos_token_id": 5,
        "eos_token_id": [7, 9],
        "pad_token_id": 9,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "decode.onnx",
            "hidden_size": 32,
            "head_size": 8,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": f"{PAST}past_key_values.layers.%d.keys",
                "past_value_names": f"{PAST}past_key_values.layers.%d.values",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": f"{PRESENT}past_key_values.layers.%d.keys",
                "present_value_names": f"{PRESENT}past_key_values.layers.%d.values",
            },
        },
    }
    search = written["search"]
    assert (search["max_length"], search["past_present_share_buffer"], search["temperature"]) == (128, False, 0.7)
    assert "top_k" not in search


def test_what_genai_does_not_run_is_said_in_a_sentence(model, tmp_path):
    assert "it has no pixel_values for a decoder" in refused(
        model, described((2, 8, 8), pixel_values=["batch", 3]), tmp_path
    )
    assert "values has 2 heads of 6 numbers where" in refused(model, described((2, 8, 8), (2, 8, 6)), tmp_path)
    state = {f"{PAST}past_key_values.layers.0.conv": ["batch", 4]}
    assert "this cache has other parts" in refused(model, described((2, 8, 8), **state), tmp_path)
    assert "this cache has other parts" in refused(model, described(), tmp_path)
    assert "this cache has other parts" in refused(model, described((2, 8, 8), (0, 8, 8)), tmp_path)
    states = {
        f"{PAST}past_key_values.layers.{i}.{part}": ["batch", 2, "past", 4] for i in (0, 1) for part in ("a", "b")
    }
    assert "this cache has other parts" in refused(model, described(**states), tmp_path)
    packed = described((2, 8, 8))
    packed["graphs"]["decode"]["operators"] = runner.OPERATORS
    assert "does not know secateur's operators" in refused(model, packed, tmp_path)
    several = described((2, 8, 8))
    several["graphs"]["encoder"] = several["graphs"]["decode"]
    assert "it runs decoders alone" in refused(model, several, tmp_path)


def test_a_sliding_window_cuts_the_context_with_a_sentence(tmp_path):
    (said,) = write_genai(decoder("Mistral", layers=1, sliding_window=40), described((2, 8, 8)), tmp_path)
    assert said.startswith("genai_config.json cuts the context from 128 to 39 tokens")
    written = json.loads((tmp_path / FILE).read_text())
    assert (written["model"]["context_length"], written["search"]["max_length"]) == (39, 39)
    assert write_genai(decoder("Qwen2", layers=1, sliding_window=40), described((2, 8, 8)), tmp_path) == []


def test_other_artefacts_get_none_without_a_word(model, tmp_path):
    assert write_genai(model, {**described((2, 8, 8)), "target": "openvino"}, tmp_path) == []
    assert write_genai(model, {"target": "onnx", "graphs": {}}, tmp_path) == []
    assert not (tmp_path / FILE).exists()


@pytest.mark.slow
def test_genai_writes_the_same_tokens_with_other_heads_in_each_layer(tmp_path):
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed")
    import onnxruntime_genai as genai

    model, tokenizer, said = cut(decoder(layers=2), [(1, 48), (2, 17)]), byte_level(), []
    export(model, "onnx", tmp_path / "out", processor=tokenizer, generate=True, say=said.append)
    assert not any("GenAI" in sentence for sentence in said)
    prompt = tokenizer(TEXTS[0])["input_ids"]
    opened = genai.Model(str(tmp_path / "out"))
    settings = genai.GeneratorParams(opened)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + 8)
    writer = genai.Generator(opened, settings)
    writer.append_tokens([prompt])
    while not writer.is_done():
        writer.generate_next_token()
    got = list(writer.get_sequence(0))
    expected = generate(tmp_path / "out", {"input_ids": [prompt]}, 8)[0].tolist()
    assert got == expected[: len(got)]
    assert len(got) > len(prompt)
    assert got[len(prompt) :] == greedy(model, prompt, len(got) - len(prompt))
