"""Attention quantities against `output_attentions` of the model itself, with eager attention."""

import numpy as np
import pytest
import torch

import secateur
from secateur.errors import ModelError
from tests import zoo

NEEDS = ["attn_sum", "attn_mass", "attn_output", "attn_confidence", "attn_entropy"]


def padded(model, side):
    batch = zoo.inputs(model)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, (slice(0, 3) if side == "left" else slice(4, None))] = 0
    return {**batch, "attention_mask": mask}


def attentions(model, batch, key="attentions"):
    """Softmax weights of each layer by the model's own eager attention: (batch, heads, queries, keys)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        result = model(**batch, output_attentions=True)
    model.set_attn_implementation(before)
    return [weights.double() for weights in result[key]]


def inputs_of(model, paths, batch):
    """What each module returns for the batch."""
    seen, handles = {}, []
    for path in paths:

        def hook(module, args, output, path=path):
            return seen.__setitem__(path, output.detach().double())

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def expected(weights, values, out, mask):
    """The five quantities of one layer, head by head. values: (batch, heads, keys, d); out: (hidden, heads d)."""
    found = {need: [] for need in NEEDS}
    for h in range(weights.shape[1]):
        a, v = weights[:, h], values[:, h]
        w = out[:, h * v.shape[-1] : (h + 1) * v.shape[-1]].double()
        log = torch.where(a > 0, a, torch.ones_like(a)).log()
        per_query = {
            "attn_sum": a.sum(-1),
            "attn_mass": (a[..., None] * v[:, None]).norm(dim=-1).sum(-1),
            "attn_output": ((a @ v) @ w.T).norm(dim=-1),
            "attn_confidence": a.max(-1).values,
            "attn_entropy": -(a * log).sum(-1),
        }
        for need, value in per_query.items():
            found[need].append(float(value[mask].mean()))
    return found


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def compare(stats, axis, wanted):
    for need in NEEDS:
        np.testing.assert_allclose(stats.mean(need, axis), wanted[need], rtol=2e-5, atol=1e-6, err_msg=need)


def test_bert_with_padding():
    model = zoo.bert(num_hidden_layers=2)
    host, batch = secateur.open(model), padded(model, "right")
    stats = host.collect(NEEDS, [batch])
    weights = attentions(model, batch)
    paths = [f"bert.encoder.layer.{i}.attention.self.value" for i in range(2)]
    seen = inputs_of(model, paths, batch)
    for i, path in enumerate(paths):
        out = model.get_parameter(f"bert.encoder.layer.{i}.attention.output.dense.weight").detach()
        wanted = expected(weights[i], heads_of(seen[path], 4), out, batch["attention_mask"].bool())
        compare(stats, f"L{i}.head", wanted)
        np.testing.assert_allclose(stats.mean("attn_sum", f"L{i}.head"), 1.0, rtol=1e-6)


def test_llama_with_groups_and_left_padding():
    model = zoo.llama(num_hidden_layers=2)
    host, batch = secateur.open(model), padded(zoo.llama(), "left")
    stats = host.collect(NEEDS, [batch])
    weights = attentions(model, batch)
    paths = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    seen = inputs_of(model, paths, batch)
    for i, path in enumerate(paths):
        values = heads_of(seen[path], 4).repeat_interleave(2, dim=1)
        out = model.get_parameter(f"model.layers.{i}.self_attn.o_proj.weight").detach()
        compare(stats, f"L{i}.head", expected(weights[i], values, out, batch["attention_mask"].bool()))


@pytest.mark.slow
def test_t5_shares_its_heads_between_layers():
    model = zoo.t5(num_layers=2)
    host, batch = secateur.open(model), padded(zoo.t5(), "right")
    axis = next(
        a for a in host.layout.of_kind("head") if any(p.startswith("encoder.") for p in host.layout.members(a.name))
    )
    stats = host.collect(NEEDS, [batch], [axis.name])
    weights = attentions(model, batch, "encoder_attentions")
    paths = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    seen = inputs_of(model, [f"{path}.v" for path in paths], batch)
    mask = batch["attention_mask"].bool()
    layers = [
        expected(w, heads_of(seen[f"{path}.v"], 4), model.get_parameter(f"{path}.o.weight").detach(), mask)
        for w, path in zip(weights, paths, strict=True)
    ]
    compare(stats, axis.name, {need: np.mean([layer[need] for layer in layers], axis=0) for need in NEEDS})
    assert stats.counts["attn_sum"][axis.name] == 2 * int(mask.sum())


def implementations(model):
    return {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_is_restored(implementation):
    from transformers import AttentionInterface

    model = zoo.bert(num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    host = secateur.open(model)
    before = implementations(model)
    host.collect(["attn_mass"], [zoo.inputs(model)])
    assert implementations(model) == before
    with pytest.raises(IndexError):
        host.collect(["attn_mass"], [{"input_ids": torch.tensor([[10**6]])}])
    assert implementations(model) == before
    assert "secateur_observer" not in AttentionInterface._global_mapping


def test_weights_that_are_nan_give_no_score():
    model = zoo.bert(num_hidden_layers=1)
    host = secateur.open(model)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="gives NaN or infinity"):
        host.collect(["attn_mass"], [zoo.inputs(model)])


def test_a_model_without_the_interface():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    host = secateur.open(model, example=(torch.randn(2, 4),))
    with pytest.raises(ModelError, match="which a Sequential does not have; use magnitude") as caught:
        host.collect(["attn_mass"], [(torch.randn(2, 4),)])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["softcap", "sinks"])
def test_capped_scores_and_sinks_are_those_of_the_model_itself(what):
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64}
    if what == "softcap":
        own = {"attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 8}
        model = zoo.random_model("Gemma2ForCausalLM", {**sizes, **own})
    else:
        own = {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        model = zoo.random_model("GptOssForCausalLM", {**sizes, **own})
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(40)
        if name.endswith("sinks"):
            parameter.data.copy_(torch.linspace(-1, 4, 4))
    model.set_attn_implementation("eager")
    host, batch = secateur.open(model), padded(model, "left")
    stats = host.collect(NEEDS, [batch])
    weights, mask = attentions(model, batch), batch["attention_mask"].bool()
    paths = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    seen = inputs_of(model, paths, batch)
    for i, path in enumerate(paths):
        values = heads_of(seen[path], 2).repeat_interleave(2, dim=1)
        out = model.get_parameter(f"model.layers.{i}.self_attn.o_proj.weight").detach()
        compare(stats, f"L{i}.head", expected(weights[i], values, out, mask))
    assert what == "softcap" or (stats.mean("attn_sum", "L0.head") < 0.99).any()


def test_an_argument_of_attention_that_nobody_knows():
    model = zoo.bert(num_hidden_layers=1)
    host = secateur.open(model)
    host.collect(["attn_mass"], [{**zoo.inputs(model), "output_router_logits": True}])
    with pytest.raises(ModelError, match=r"attention\.self takes 'tilt', which is not understood here") as caught:
        host.collect(["attn_mass"], [{**zoo.inputs(model), "tilt": torch.ones(4)}])
    assert "\n" not in str(caught.value)
