"""Every kind of removal against masking, on models traced from the graph: layers, experts, hidden, widths, tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from secateur.check import VerifyError, verify
from secateur.dims import format_dims
from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.torch.files.saving import save
from secateur.torch.host import TorchHost
from secateur.torch.shrink.masking import bypassed_module
from secateur.torch.shrink.norms import centred_norms, norms_over
from secateur.torch.trace.derive import trace
from tests import zoo
from tests.torch import slow
from tests.torch.exact import difference
from tests.torch.layouts import host_of

NEOX_ROPE = {"rope_type": "default", "rope_theta": 10000}


def checked(host, keep, tolerance=1e-5):
    """Verify a plan, and that it changes the outputs at all; the shrunk host."""
    plan = Plan({name: np.asarray(list(units)) for name, units in keep.items()})
    contract = host.contract(plan)
    batch = contract.before(host.example)
    dense = contract.expected(host.outputs(batch))
    with host.masked(plan):
        masked = contract.expected(host.outputs(batch))
    assert max(np.abs(a - b).max() for a, b in zip(dense, masked, strict=True)) > 1e-4
    verdict = verify(host, plan, [host.example], tolerance=tolerance)
    small = host.copy()
    small.resize(plan)
    return small, verdict


# -- layers -------------------------------------------------------------------------------------------------------


LAYERED = ["bert", "llama", "gpt2", "vit", "torch_encoder"]
MORE_LAYERED = ["whisper", "phi3", "gemma2", "falcon", "qwen3", "mixtral", "dinov2", "clip"]


@pytest.mark.parametrize("name", [*LAYERED, *slow(*MORE_LAYERED)])
def test_a_removed_layer_equals_a_bypassed_one(name):
    host = host_of(name)
    axes = host.layout.of_kind("layer")
    assert axes
    for axis in axes:
        for kept in (0, 1):
            small, _ = checked(host, {axis.name: [kept]})
            assert len(small.model.get_submodule(axis.path)) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", *slow("phi3", "whisper")])
def test_generation_after_layers_and_heads_go_uses_its_cache(name):
    host = host_of(name, **({"num_hidden_layers": 3} if name != "whisper" else {"decoder_layers": 3}))
    axis = next(a for a in host.layout.of_kind("layer") if a.size == 3)
    heads = next(a for a in host.layout.axes.values() if a.kind in ("kv", "head") and not a.parts and "L0" in a.name)
    small, _ = checked(host, {axis.name: [0, 2], heads.name: range(1, heads.size)})
    ids = {k: v for k, v in host.example.items() if k in ("input_ids", "input_features")}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = small.model.generate(**ids, use_cache=True, **options)
    assert torch.equal(cached, small.model.generate(**ids, use_cache=False, **options))


class Block(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, mask=None, hidden_states=None):
        new = hidden_states * 2
        return {"tensor": new, "tuple": (new, mask), "list": [new, mask], "mapping": {"x": new, "mask": mask}}[
            self.form
        ]


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "mapping"])
def test_bypass_finds_the_stream_by_its_shape(form):
    block, mask, stream = Block(form), torch.zeros(2, 1), torch.ones(2, 3)
    for call in (lambda: block(mask, stream), lambda: block(hidden_states=stream, mask=mask)):
        with bypassed_module(block):
            out = call()
        first = out if form == "tensor" else out["x"] if form == "mapping" else out[0]
        assert first is stream
        if form != "tensor":
            assert (out["mask"] if form == "mapping" else out[1]) is mask
    assert not block._forward_hooks


def test_a_layer_that_changes_the_shape_cannot_be_bypassed():
    layer = nn.Linear(3, 4)
    with bypassed_module(layer), pytest.raises(ModelError, match=r"given no tensor of the shape \(2, 4\)"):
        layer(torch.ones(2, 3))


# -- experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", *slow("deepseek")])
def test_removed_experts_equal_experts_that_the_router_never_picks(name):
    host = host_of(name)
    axes = host.layout.of_kind("expert")
    keep = {a.name: [0, 2, 3] if i == 0 else [1, 3] for i, a in enumerate(axes)}
    small, _ = checked(host, keep)
    router = next(m for n, m in small.model.named_modules() if n.endswith("mlp.gate"))
    assert router.weight.shape[0] == 3


def test_fewer_experts_than_every_token_needs_are_refused():
    host = host_of("mixtral")
    with pytest.raises(ModelError, match="routes every token to 2 experts; 1 would remain"):
        host.copy().resize(Plan({"L0.expert": np.array([1])}))


def test_experts_without_a_router_cannot_be_masked():
    host = host_of("mixtral")
    params = {name: dims for name, dims in host.layout.params.items() if name != "model.layers.0.mlp.gate.weight"}
    host.layout = dataclasses.replace(host.layout, params=params)
    masked = host.masked(Plan({"L0.expert": np.array([1, 2])}))
    with pytest.raises(ModelError, match=r"no router weight has one row for each of L0.expert"), masked:
        pass


# -- hidden width -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", *slow("qwen3", "phi3", "mixtral")])
def test_hidden_width_is_exact_under_rms_norms(name):
    host = host_of(name, rms_norm_eps=1e-3)  # as large as it takes to see that the epsilon is mended too
    assert norms_over(host.model, host.layout, "hidden")
    assert not centred_norms(host.model, host.layout, "hidden")
    small, verdict = checked(host, {"hidden": [*range(3, 32, 2), 8]})
    assert not verdict.inexact
    assert small.model.config.hidden_size == 16


@pytest.mark.parametrize("name", ["bert", "gpt2", *slow("vit", "gpt_neox")])
def test_hidden_width_under_layer_norms_is_inexact_and_says_so(name):
    host = host_of(name)
    size = host.layout.axis("hidden").size
    assert centred_norms(host.model, host.layout, "hidden")
    small, verdict = checked(host, {"hidden": range(size - 4)})
    assert "subtract the mean" in verdict.inexact
    assert "fine-tune" in verdict.inexact
    assert verdict.difference > 1e-5
    assert all(np.isfinite(a).all() for a in small.outputs(small.example))


@pytest.mark.slow
def test_hidden_width_of_t5_with_tied_embeddings_and_relative_bias(tmp_path):
    """The scale d_model ** -0.5 before the tied logits does not follow, the bias per head is left as it is."""
    host = host_of("t5", layer_norm_epsilon=1e-3)
    assert host.model.config.tie_word_embeddings
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    before = host.read(bias).clone()
    small, verdict = checked(host, {"hidden": [*range(1, 24, 2), 0, 10]})
    assert not verdict.inexact
    model = small.model
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    assert model.shared.weight.shape == (60, 14)
    assert torch.equal(small.read(bias), before)
    assert model.model_dim == 24
    assert model.encoder.final_layer_norm.variance_epsilon == pytest.approx(1e-3 * 24 / 14)
    save(model, tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a").eval()
    again.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        loaded = TorchHost(type(model).from_pretrained(tmp_path / folder).eval(), host.example, layout=small.layout)
        for a, b in zip(loaded.outputs(host.example), small.outputs(host.example), strict=True):
            assert np.array_equal(a, b)
    ids = {"input_ids": host.example["input_ids"]}
    options = {"max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0}
    assert torch.equal(again.generate(**ids, **options), model.generate(**ids, **options))


@pytest.mark.slow
def test_hidden_width_of_equal_layers_makes_a_stock_checkpoint_with_its_epsilon(tmp_path):
    small, _ = checked(host_of("llama", rms_norm_eps=1e-3), {"hidden": range(16)})
    save(small.model, tmp_path / "a", uniform=True)
    again = type(small.model).from_pretrained(tmp_path / "a").eval()
    assert (again.config.hidden_size, again.config.rms_norm_eps) == (16, 2e-3)
    loaded = TorchHost(again, small.example, layout=small.layout)
    assert np.array_equal(loaded.outputs(small.example)[0], small.outputs(small.example)[0])


@pytest.mark.slow
def test_hidden_width_leaves_rotary_frequencies_as_they_were(tmp_path):
    """Falcon computes them from hidden / heads when it is built, and again when it is loaded."""
    small, _ = checked(host_of("falcon"), {"hidden": range(16)})
    save(small.model, tmp_path / "a")
    again = type(small.model).from_pretrained(tmp_path / "a").eval()
    assert again.config.hidden_size == 16
    assert torch.equal(again.transformer.rotary_emb.inv_freq, small.model.transformer.rotary_emb.inv_freq)
    loaded = TorchHost(again, small.example, layout=small.layout)
    assert np.array_equal(loaded.outputs(small.example)[0], small.outputs(small.example)[0])


@pytest.mark.parametrize(
    ("name", "axis"), [pytest.param("whisper", "decoder.hidden", marks=pytest.mark.slow), ("albert", "embedding")]
)
def test_other_widths_under_layer_norms_are_inexact_too(name, axis):
    """Whisper has two streams of one size, of which one keeps its width; ALBERT a narrow embedding."""
    host = host_of(name)
    _, verdict = checked(host, {axis: range(host.layout.axis(axis).size - 2)})
    assert "subtract the mean" in verdict.inexact
    assert np.isfinite(verdict.difference)


# -- widths of heads ----------------------------------------------------------------------------------------------


def test_rotary_pairs_go_together_with_as_many_value_channels():
    host = host_of("llama")
    small, _ = checked(host, {"qk": [0, 1, 3], "L0.v": [0, 1, 2, 4, 5, 7], "L1.v": range(6)})
    assert [layer.self_attn.head_dim for layer in small.model.model.layers] == [6, 6]
    assert small.model.model.rotary_emb.inv_freq.shape == (3,)
    ids = host.example["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        small.model.generate(ids, use_cache=True, **options), small.model.generate(ids, use_cache=False, **options)
    )


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", *slow("t5")])
def test_query_key_and_value_widths_shrink_alike(name):
    host = host_of(name)
    keep = {
        a.name: [0, 2, 3, 5] if a.kind == "qk" else [1, 2, 3, 4] for k in ("qk", "v") for a in host.layout.of_kind(k)
    }
    checked(host, keep)


@pytest.mark.slow
def test_a_scale_that_is_computed_from_the_width_freezes_it():
    """DeBERTa divides by sqrt(3 * the width of a query head) at run time: fewer would be scaled otherwise."""
    host = host_of("deberta")
    axes = host.layout.of_kind("qk", prunable=False)
    assert len(axes) == 2
    assert all("may follow its size" in axis.frozen for axis in axes)
    free = dataclasses.replace(
        host.layout, axes={n: dataclasses.replace(a, frozen=None) for n, a in host.layout.axes.items()}
    )
    keep = {axis.name: [0, 2, 3, 5] for axis in axes}
    assert difference(host.model, free, keep, host.example) > 1e-3
    checked(host, {"L0.v": [0, 2, 5], "L1.head": [1, 3]})


def test_partly_rotary_heads_in_a_fused_weight():
    """GPT-NeoX: each head has its query, key and value in turn, and turns the first part of query and key."""
    host = host_of("gpt_neox", num_attention_heads=2, rope_parameters={**NEOX_ROPE, "partial_rotary_factor": 0.5})
    fused = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert format_dims(host.layout.params[fused]) == "(L0.head (2 qk + L0.qk + 2 qk + L0.qk + L0.v)) hidden"
    assert [host.layout.axis(a).size for a in ("qk", "L0.qk", "L0.v")] == [4, 8, 16]
    assert all(host.layout.axis(a).frozen for a in ("qk", "L0.qk", "L0.v"))
    checked(host, {"L0.head": [1], "L1.head": [0], "L1.ffn": range(7)})


def test_value_width_alone_where_the_model_has_a_size_of_its_own():
    host = host_of("deepseek")
    checked(host, {"L0.v": [0, 3, 4], "L1.v": [1, 2]})


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_value_width_alone_is_refused_where_one_size_serves_both(name):
    host = host_of(name)
    with pytest.raises(ModelError, match="prune them alike"):
        host.copy().resize(Plan({"L0.v": np.array([0, 1, 2])}))


# -- torch attention ----------------------------------------------------------------------------------------------


def test_torch_encoder_layers_lose_neurons_and_keep_their_heads():
    host = host_of("torch_encoder")
    ffn = [a.name for a in host.layout.of_kind("ffn")]
    assert len(ffn) == 2
    checked(host, {ffn[0]: range(9), ffn[1]: range(3, 30)})
    for axis in host.layout.of_kind("head"):
        with pytest.raises(ModelError, match=r"torch.nn.MultiheadAttention, which insists"):
            host.copy().resize(Plan({axis.name: np.array([0])}))


def test_verify_refuses_a_shrunk_model_that_differs():
    host = host_of("bert")
    plan = Plan({"L0.ffn": np.arange(10)})

    class Wrong(TorchHost):
        def resize(self, plan):
            super().resize(plan)
            list(self.model.parameters())[-1].data.add_(1.0)

    wrong = Wrong(host.model, host.example, layout=host.layout)
    with pytest.raises(VerifyError, match="masked and shrunk outputs differ by"):
        verify(wrong, plan, [host.example])


def test_a_single_layer_counts_without_pooler_and_classifier():
    model = zoo.bert(num_hidden_layers=1)
    layout = trace(model, zoo.inputs(model))
    names = default_weights(layout)
    assert len(names) == 6
    assert all(name.startswith("bert.encoder.layer.0.") for name in names)
