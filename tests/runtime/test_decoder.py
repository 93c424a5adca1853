"""Blocks of a decoder that take one token of each sequence in one go."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn
from transformers import AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.format import ATTENTION, ROTARY
from secateur.kernels.native import load_native
from secateur.runtime import saving
from secateur.runtime.compile_model import STEPPED
from secateur.runtime.run import decoder_step, install_decoder_step
from tests import zoo

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}


def decoder(name, **more):
    model = zoo.random_model(f"{name}ForCausalLM", {**SIZES, **more})
    return zoo.pruned(model, 0.3, only=lambda m: zoo.is_linear(m) and m is not model.lm_head)


MODELS = {
    "llama": ("Llama", {}),
    "biases": ("Qwen2", {}),
    "norms of heads": ("Qwen3", {"head_dim": 24}),
    "norms after layers": ("Olmo2", {}),
    "no gate": ("Starcoder2", {"num_key_value_heads": 4}),
    "a window": ("Mistral", {"sliding_window": 5}),
    "some without positions": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def prompt(batch=2, length=6):
    return torch.randint(2, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def example():
    ids = prompt()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compiled(model, **more):
    return runtime.compile(model, measure=False, example=example(), **more)


@pytest.fixture
def steps(monkeypatch):
    """The shapes of what programs were run on."""
    seen, real = [], decoder_step.DecoderRunner.run

    def run(self, x, inputs, prepared):
        seen.append(tuple(x.shape))
        return real(self, x, inputs, prepared)

    monkeypatch.setattr(decoder_step.DecoderRunner, "run", run)
    return seen


def generated(model, ids, **more):
    with torch.inference_mode():
        return model.generate(
            ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
        )


def same(model, other, ids, **more):
    a, b = generated(model, ids, **more), generated(other, ids, **more)
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "more"), MODELS.values(), ids=MODELS)
def test_decoders_generate_what_the_pruned_ones_do(name, more, steps):
    model = decoder(name, **more)
    fast = compiled(model)
    assert fast.secateur_report.fused[STEPPED] == 3
    assert "3 blocks of a decoder at one token" in fast.secateur_report.summary()
    assert "No blocks" not in fast.secateur_report.summary()
    steps.clear()
    same(model, fast, prompt())
    assert steps == [(2, 1, 48)] * (7 * 3)  # the prompt's last token gives the first of eight


def test_padding_beams_and_other_caches(steps):
    model = decoder("Llama")
    fast = compiled(model)
    ids = prompt()
    ids[0, :3] = 0
    mask = (ids != 0).long()
    steps.clear()
    same(model, fast, ids, attention_mask=mask)
    assert len(steps) == 21
    same(model, fast, ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
    beams = [m.generate(prompt(), max_new_tokens=6, num_beams=3, do_sample=False) for m in (model, fast)]
    assert torch.equal(*beams)
    assert len(steps) > 42
    steps.clear()
    with torch.inference_mode():
        expected, got = (m(prompt(1, 1), use_cache=True) for m in (model, fast))
        assert len(steps) == 3
        assert fast(prompt(1, 1), use_cache=False).logits.shape == (1, 1, 99)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(steps) == 3


def test_layers_that_stay_dense_and_layers_in_several_forms(steps, monkeypatch):
    model = decoder("Llama")
    nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    nn.init.normal_(model.model.layers[1].mlp.gate_proj.weight, std=0.2)
    nn.init.normal_(model.model.layers[2].self_attn.o_proj.weight)
    fast = compiled(model)
    assert type(fast.model.layers[1].mlp.up_proj) is nn.Linear
    assert fast.secateur_report.fused[STEPPED] == 3
    same(model, fast, prompt())
    both = runtime.compile(model, tokens=(1, 40), measure=False, example=example())
    steps.clear()
    same(model, both, prompt())
    assert len(steps) == 21


def test_saved_copied_and_pickled_decoders(tmp_path, steps):
    model = decoder("Qwen3", head_dim=24)
    fast = compiled(model)
    saving.save(fast, tmp_path / "saved")
    for one in (saving.load(tmp_path / "saved"), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert {*decoder_step.decoders_of(one)} == {f"model.layers.{i}" for i in range(3)}
        steps.clear()
        same(model, one, prompt())
        assert len(steps) == 21
        runner = one.model.layers[0].runner
        assert runner.block is one.model.layers[0]
        assert {id(m) for m, _ in runner.inside} == {id(m) for m in one.model.layers[0].modules()}


def test_a_damaged_plan_is_refused(tmp_path):
    saving.save(compiled(decoder("Llama")), tmp_path / "saved")
    file = tmp_path / "saved" / "runtime.json"
    whole = file.read_text()

    def refused(change):
        manifest = json.loads(whole)
        plan = manifest["decoders"]["model.layers.1"]
        change(plan, plan["steps"])
        file.write_text(json.dumps(manifest))
        with pytest.raises(ModelError, match="damaged: its decoders do not fit"):
            saving.load(tmp_path / "saved")

    kinds = [step["kind"] for step in json.loads(whole)["decoders"]["model.layers.1"]["steps"]]
    turned, attention = kinds.index(ROTARY), kinds.index(ATTENTION)
    refused(lambda plan, steps: steps[1].update(weight="self_attn.nothing.packed"))
    refused(lambda plan, steps: steps[1].update(weight=None))
    refused(lambda plan, steps: steps[1].update(weight="mlp.up_proj.packed"))
    refused(lambda plan, steps: steps[1].update(bias="self_attn.q_proj.bias"))
    refused(lambda plan, steps: steps[0].update(scale="mlp.gate_proj.weight"))
    refused(lambda plan, steps: steps[0].update(reads=[40, -1]))
    refused(lambda plan, steps: steps[turned].update(heads=[2, 2, 24]))
    refused(lambda plan, steps: steps[attention].update(heads=[4, 3, 12]))
    refused(lambda plan, steps: steps.append({**steps[attention], "reads": [1, 2, 3]}))
    refused(lambda plan, steps: steps.pop(attention))
    refused(lambda plan, steps: steps[attention].update(kind=7))
    refused(lambda plan, steps: plan.update(attention="nothing"))
    refused(lambda plan, steps: plan.update(attention="mlp"))
    refused(lambda plan, steps: steps[attention].update(heads=[4, 2]))
    refused(lambda plan, steps: steps[attention].update(heads=[2**60, 2, 12]))
    refused(lambda plan, steps: steps[attention].update(reads=[*steps[attention]["reads"][:2], 0]))
    refused(lambda plan, steps: steps[0].update(number=-1.0))
    refused(lambda plan, steps: plan["form"].update(turns=""))
    refused(lambda plan, steps: plan.update(code="import os"))
    refused(lambda plan, steps: steps[1].update(activation=99))
    refused(lambda plan, steps: plan["form"].update(given="x"))
    refused(lambda plan, steps: plan["form"].update(given=1 << 40))
    refused(lambda plan, steps: plan.pop("form"))
    refused(lambda plan, steps: plan.update(width=47))


def test_hooks_training_gradients_and_exchanged_modules_go_the_long_way(steps):
    model = decoder("Llama")
    fast = compiled(model)
    with torch.inference_mode():
        cache = fast(prompt(), use_cache=True).past_key_values
    one = torch.full((2, 1), 7)

    def logits(of, **more):
        with torch.inference_mode():
            return of(one, past_key_values=copy.deepcopy(cache), **more).logits

    expected = logits(model)
    seen = []
    handle = fast.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    steps.clear()
    torch.testing.assert_close(logits(fast), expected, rtol=1e-4, atol=1e-4)
    assert (len(steps), seen) == (2, [1])
    handle.remove()
    fast.model.layers[1].train()
    steps.clear()
    torch.testing.assert_close(logits(fast), expected, rtol=1e-4, atol=1e-4)
    assert len(steps) == 2
    fast.eval()
    fast.model.layers[2].mlp.down_proj = nn.Identity()
    fast.model.layers[2].mlp.up_proj = nn.Linear(48, 48)
    fast.model.layers[2].mlp.gate_proj = nn.Linear(48, 48)
    steps.clear()
    assert not torch.allclose(logits(fast), expected)
    assert len(steps) == 2
    steps.clear()
    with pytest.raises(RuntimeError, match="no backward"):
        fast(one, past_key_values=copy.deepcopy(cache))
    assert not steps


def test_weights_that_move_or_change_are_seen(steps):
    model = decoder("Llama")
    fast = compiled(model)
    generated(fast, prompt(1))
    fast.share_memory()
    same(model, fast, prompt(1))
    norms = [m.model.layers[1].input_layernorm for m in (model, fast)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.data = norm.weight.data * 3
    same(model, fast, prompt(1))
    steps.clear()
    for norm in norms:
        norm.weight = nn.Parameter(torch.rand(48, 2, generator=torch.Generator().manual_seed(3))[:, 0])
    same(model, fast, prompt(1))
    assert len(steps) == 14  # the layer with the strided weight takes the long way


def test_another_attention_is_asked(steps):
    model = decoder("Llama")
    fast = compiled(model)
    for m in (model, fast):
        for layer in m.model.layers:
            layer.self_attn.scaling = 1.0
    same(model, fast, prompt())
    assert not steps[3:]

    def half(*args, **kwargs):
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return output * 0.5, weights

    transformers.AttentionInterface.register("half", half)
    AttentionMaskInterface.register("half", sdpa_mask)
    fast = compiled(model)
    steps.clear()
    for m in (model, fast):
        m.set_attn_implementation("half")
    same(model, fast, prompt())
    assert not steps


def test_a_mask_of_other_keys_is_refused():
    fast = compiled(decoder("Llama"))
    with torch.inference_mode():
        cache = fast(prompt(), use_cache=True).past_key_values
        mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
        with pytest.raises(ValueError, match="mask is of 12 keys, but the cache holds 7"):
            fast(torch.full((2, 1), 7), past_key_values=cache, attention_mask=mask)


def test_hidden_states_and_attentions_are_shown_as_before(steps):
    model = decoder("Llama")
    fast = compiled(model)
    with torch.inference_mode():
        cache = fast(prompt(), use_cache=True).past_key_values
        for more in ({"output_hidden_states": True}, {"output_attentions": True}):
            expected, got = (
                m(torch.full((2, 1), 7), past_key_values=copy.deepcopy(cache), **more) for m in (model, fast)
            )
            for name in ("hidden_states", "attentions"):
                assert (getattr(got, name) is None) == (getattr(expected, name) is None)
                for a, b in zip(getattr(expected, name) or (), getattr(got, name) or (), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        steps.clear()
        fast(torch.full((2, 1), 7), past_key_values=cache)
    assert len(steps) == 3  # the hooks that were left are at rest


def test_nan_in_one_sequence_stays_there():
    model = decoder("Llama")
    fast = compiled(model)
    with torch.inference_mode():
        cache = fast(prompt(), use_cache=True).past_key_values
        x = torch.randn(2, 1, 48)
        x[0, 0, 3] = float("nan")
        expected, got = (m(inputs_embeds=x, past_key_values=copy.deepcopy(cache)).logits for m in (model, fast))
    assert torch.isnan(got[0]).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_several_threads_at_once():
    model = decoder("Llama")
    fast = compiled(model)
    expected = generated(model, prompt()).sequences
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: generated(fast, prompt()).sequences, range(8)))
    assert all(torch.equal(one, expected) for one in got)


def test_what_cannot_take_a_token_at_a_time_says_why():
    fast = compiled(decoder("Phi3"))
    assert fast.secateur_report.fused[STEPPED] == 0
    assert "slice.Tensor" in fast.secateur_report.apart
    assert "No blocks run as one call: model.layers.0 computes" in fast.secateur_report.summary()


def test_a_block_that_would_give_something_else_is_left_alone(monkeypatch):
    real = decoder_step.DecoderRunner.run
    monkeypatch.setattr(decoder_step.DecoderRunner, "run", lambda self, *args: real(self, *args) * 1.001)
    fast = compiled(decoder("Llama"))
    assert not decoder_step.decoders_of(fast)
    assert fast.secateur_report.apart == "model.layers.0 gives another result one token at a time"

    def keeps_nothing(self, x, inputs, prepared):
        inputs.cache = copy.deepcopy(inputs.cache)
        return real(self, x, inputs, prepared)

    monkeypatch.setattr(decoder_step.DecoderRunner, "run", keeps_nothing)
    assert not decoder_step.decoders_of(compiled(decoder("Llama")))
    monkeypatch.setattr(install_decoder_step, "_both", lambda *_: 1 / 0)
    fast = compiled(decoder("Llama"))
    assert fast.secateur_report.apart.startswith("model.layers.0 cannot be tried with a cache (ZeroDivisionError")


def test_under_torch_compile_and_export_blocks_are_as_they_were(steps):
    model = decoder("Llama", num_hidden_layers=1)
    fast = compiled(model)
    with torch.inference_mode():
        expected = model(prompt(), use_cache=False).logits
        got = torch.compile(fast, backend="eager")(prompt(), use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
