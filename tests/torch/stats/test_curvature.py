"""Curvature from activations alone, against gradients of single examples taken with respect to the weights."""

import numpy as np
import pytest
import torch

import secateur
from secateur.errors import DataError
from secateur.tasks.base.fisher import class_scores
from secateur.torch.stats.curvature import collect_curvature
from tests import zoo


def score(output, batch, generator):
    """Without draws, so that single examples can be compared: the logits, weighted by their place."""
    logits = output.logits.reshape(len(output.logits), -1)
    return (logits * torch.linspace(-1, 1, logits.shape[1])).sum()


def drawn(output, batch, generator):
    return class_scores(output.logits.reshape(-1, output.logits.shape[-1]), generator).sum()


def curvature(model, batches, score=score, **options):
    return collect_curvature(model, secateur.open(model, batches[0]).layout, batches, score, **options)


def one(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama, zoo.vit, zoo.gpt2, zoo.t5])
def test_gates_are_squared_for_each_example(make):
    """dD/d(gate) is the sum over the weights that read a unit of w dD/dw."""
    model = make()
    batch = zoo.inputs(model)
    layout = secateur.open(model, batch).layout
    found = collect_curvature(model, layout, [batch], score)
    for axis, sums in found.sums["fisher_gate"].items():
        readers = [name for name in layout.linears if layout.reads(name, axis)]
        expected = 0
        for i in range(2):
            value = score(model(**one(batch, i)), None, None)
            weights = [model.get_parameter(name) for name in readers]
            slopes = torch.autograd.grad(value, weights)
            parts = zip(readers, weights, slopes, strict=True)
            expected = expected + sum(layout.reduce(n, (w * s).detach(), axis) for n, w, s in parts) ** 2
        np.testing.assert_allclose(sums, expected, rtol=2e-3, atol=1e-5 * expected.max())
        assert found.counts["fisher_gate"][axis] == 2
    assert {"L0.ffn", "encoder.L0.ffn"} & set(found.sums["fisher_gate"])


def test_matrices_are_those_of_inputs_and_gradients_of_real_tokens():
    """Padding changes nothing: the sums are those of the same rows one by one, without it."""
    model = zoo.bert()
    batch = zoo.inputs(model)
    batch["attention_mask"][1, 4:] = 0
    padded = curvature(model, [batch])
    apart = curvature(model, [one(batch, 0), {name: value[1:, :4] for name, value in batch.items()}])
    for quantity in ("fisher_in", "fisher_mean", "fisher_out"):
        for name, value in padded.sums[quantity].items():
            largest = np.abs(value).max()
            np.testing.assert_allclose(value, apart.sums[quantity][name], rtol=1e-3, atol=1e-5 * largest)
            assert padded.counts[quantity][name] == pytest.approx(apart.counts[quantity][name], rel=1e-4)


def test_the_weighted_sums_of_one_layer_by_hand():
    model = zoo.bert()
    batch, path = zoo.inputs(model), "bert.encoder.layer.1.output.dense"
    kept = {}

    def see(module, args, output):
        kept["x"], kept["y"] = args[0].detach(), output
        output.retain_grad()

    handle = model.get_submodule(path).register_forward_hook(see)
    score(model(**batch), None, None).backward()
    handle.remove()
    x, g = kept["x"].reshape(-1, 48), kept["y"].grad.reshape(-1, 32)
    weight = g.square().sum(1)
    found = curvature(model, [batch])
    name = f"{path}.weight"
    np.testing.assert_allclose(found.sums["fisher_in"][name], (x * weight[:, None]).T @ x, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sums["fisher_mean"][name], weight @ x, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sums["fisher_out"][name], g.T @ g, rtol=1e-3, atol=1e-6)
    assert found.counts["fisher_in"][name] == pytest.approx(float(weight.sum()), rel=1e-5)
    assert found.counts["fisher_out"][name] == 2


def test_parts_of_the_data_add_up_to_the_whole_with_the_same_draws():
    model = zoo.llama()
    batches = [zoo.inputs(model, seed) for seed in range(4)]
    whole = curvature(model, batches, drawn, seed=3)
    parts = curvature(model, batches[:1], drawn, seed=3).merge(curvature(model, batches[1:], drawn, seed=3, first=1))
    other = curvature(model, batches, drawn, seed=4)
    for quantity, entries in whole.sums.items():
        for name, value in entries.items():
            np.testing.assert_allclose(value, parts.sums[quantity][name], rtol=1e-3, atol=1e-6 * np.abs(value).max())
    assert not np.allclose(whole.sums["fisher_gate"]["L0.ffn"], other.sums["fisher_gate"]["L0.ffn"])


def test_experts_and_what_they_share_get_gates_from_their_weights():
    model = zoo.mixtral()
    found = curvature(model, [zoo.inputs(model, seed) for seed in range(2)], drawn)
    assert found.sums["fisher_gate"]["L0.expert"].shape == (4,)
    assert found.sums["fisher_gate"]["L0.ffn"].shape == (24,)
    assert (found.sums["fisher_gate"]["L0.ffn"] > 0).all()
    assert not any("experts" in name for name in found.sums["fisher_in"])


def test_the_model_is_left_as_it_was():
    model = zoo.bert().train()
    frozen = model.get_parameter("classifier.bias").requires_grad_(requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curvature(model, [zoo.inputs(model)])
    assert model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "classifier.bias")
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_data_and_infinite_scores_are_refused():
    model = zoo.bert()
    layout = secateur.open(model, zoo.inputs(model)).layout
    with pytest.raises(DataError, match="no batch was seen"):
        collect_curvature(model, layout, [], score)
    with pytest.raises(DataError, match="score of batch 0 is nan"):
        collect_curvature(model, layout, [zoo.inputs(model)], lambda *_: torch.tensor(float("nan")))
    with pytest.raises(DataError, match="cannot collect 'fisher_in'"):
        secateur.open(model, zoo.inputs(model)).collect({"fisher_in"}, [zoo.inputs(model)])
