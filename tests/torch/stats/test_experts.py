"""What experts are sent and add, against a loop over tokens and experts on the weights themselves."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import secateur
from secateur import criteria
from secateur.errors import ModelError
from tests import zoo

NEEDS = ["expert_routed", "expert_output"]
QWEN = (
    "Qwen2MoeForCausalLM",
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    | {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"shared_expert_intermediate_size": 16, "max_position_embeddings": 64},
)


@functools.cache
def opened(name):
    """The host of a tiny mixture, which no test changes, and the name of its number of experts in the config."""
    model, number = (
        (zoo.build("mixtral"), "num_local_experts") if name == "mixtral" else (zoo.random_model(*QWEN), "num_experts")
    )
    return secateur.open(model), number


def batch_of(padded=3):
    ids = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9 - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(model, batch):
    """Layer -> (share of the real tokens, mean over its tokens of |gate weight times output|) of each expert."""
    calls = {}

    def see(module, args, output):
        calls[module] = args

    blocks = [layer.mlp for layer in model.model.layers]
    handles = [block.experts.register_forward_hook(see) for block in blocks]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].flatten().bool()
    found = []
    for block in blocks:
        states, index, gates = calls[block.experts]
        sizes = [[] for _ in range(len(block.experts.down_proj))]
        for token in torch.arange(len(states))[real]:
            for expert, gate in zip(index[token].tolist(), gates[token], strict=True):
                a, b = (block.experts.gate_up_proj[expert] @ states[token]).chunk(2)
                added = gate * (block.experts.down_proj[expert] @ (F.silu(a) * b))
                sizes[expert].append(float(added.detach().norm()))
        share = [len(s) / int(real.sum()) for s in sizes]
        found.append((share, [float(np.mean(s)) if s else 0.0 for s in sizes]))
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_loop_over_tokens_and_experts_and_padding_left_out(name):
    (host, _), batch = opened(name), batch_of()
    stats = host.collect(NEEDS, [batch])
    for i, (share, saliency) in enumerate(by_hand(host.model, batch)):
        axis = f"L{i}.expert"
        np.testing.assert_allclose(stats.mean("expert_routed", axis), share, rtol=1e-9)
        found = criteria.routed_saliency(stats.mean("expert_output", axis), stats.mean("expert_routed", axis))
        np.testing.assert_allclose(found, saliency, rtol=1e-5)
        mass = criteria.routed_mass(stats.mean("expert_output", axis))
        np.testing.assert_allclose(mass, np.multiply(share, saliency), rtol=1e-5)
        assert sum(share) == pytest.approx(2)  # two experts a token
    assert not any(module._forward_hooks for module in host.model.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_half_of_the_experts_go_and_the_folder_is_a_stock_checkpoint(name, tmp_path):
    (whole, number), batch = opened(name), batch_of()
    expected = [set(np.argsort(saliency)[len(saliency) // 2 :]) for _, saliency in by_hand(whole.model, batch)]
    plan = secateur.prune(whole, criteria.routed_saliency, secateur.Unit("expert"), 0.5, data=[batch])
    assert [set(plan.keep[f"L{i}.expert"].tolist()) for i in range(2)] == expected
    secateur.verify(whole, plan, [batch])
    host = whole.copy()
    host.resize(plan)
    host.save(tmp_path / "small", plan)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert getattr(again.config, number) == getattr(whole.model.config, number) // 2
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, host.model(**batch).logits)


def test_fewer_experts_than_a_token_needs_are_refused():
    (host, _), batch = opened("mixtral"), batch_of()
    plan = secateur.prune(host, criteria.routing_frequency, secateur.Unit("expert"), 0.75, data=[batch])
    with pytest.raises(ModelError, match="routes every token to 2 experts; 1 would remain, keep more"):
        secateur.verify(host, plan, [batch])


def test_an_output_that_is_no_sum_of_experts_is_refused():
    host = opened("mixtral")[0].copy()
    experts = host.model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *args: F.normalize(forward(*args), dim=-1)
    with pytest.raises(ModelError, match=r"layers.0.mlp.experts is not the sum of what its experts add"):
        host.collect(NEEDS, [batch_of()])


def test_arguments_that_are_not_understood_are_refused():
    host = opened("mixtral")[0].copy()
    experts = host.model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda states, index, gates: forward(states[0], index, gates)
    experts.register_forward_pre_hook(lambda module, args: (args[0][None], *args[1:]))
    with pytest.raises(ModelError, match=r"layers.0.mlp.experts is not called with the states of tokens"):
        host.collect(NEEDS, [batch_of()])


def test_experts_that_are_not_stacked_are_refused():
    host = opened("mixtral")[0].copy()
    params = {name: dims for name, dims in host.layout.params.items() if "0.mlp.experts." not in name}
    host.layout = dataclasses.replace(host.layout, params=params)
    with pytest.raises(ModelError, match=r"the experts of L0.expert are not stacked in one weight"):
        host.collect(NEEDS, [batch_of()])
