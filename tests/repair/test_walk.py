"""prune with repair: the plan holds new weights, and everything that takes a plan works with them."""

import functools

import numpy as np
import pytest

import secateur
from secateur import criteria, repair
from secateur.arrays import to_numpy
from secateur.errors import DataError, PlanError
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.repair import prepare
from secateur.select import NM, Block, Element, Unit

from ..fake import FakeHost

torch = pytest.importorskip("torch")
from tests import zoo


def batches(model, count=3):
    found = [zoo.inputs(model, seed) for seed in range(count)]
    for batch in found:
        batch["attention_mask"][0, 5:] = 0
    return found


def inputs_of(model, path, data):
    """What a module reads of real tokens, (tokens, in), float64."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, data, strict=True)]).double()


@pytest.mark.parametrize(("make", "stack"), [(zoo.llama, "model.layers"), (zoo.gpt2, "transformer.h")])
def test_each_weight_is_repaired_on_its_own_inputs(make, stack):
    model = make(num_hidden_layers=2) if make is zoo.llama else make(n_layer=2)
    host, data = secateur.open(model), batches(model)
    plan = secateur.prune(host, repair=repair.sparsegpt, pattern=NM(2, 4), data=data)
    names = default_weights(host.layout)
    assert set(plan.masks) == set(plan.weights) == set(names)
    assert all(name.startswith(stack) for name in names)
    for name in names:
        x = inputs_of(model, name.removesuffix(".weight"), data)
        weight = model.get_parameter(name).detach()
        rows = weight if host.layout.linears[name].in_dim == 1 else weight.T
        expected = repair.sparsegpt(rows.contiguous(), x.T @ x / len(x), NM(2, 4))
        got = torch.tensor(plan.weights[name])
        got = got if host.layout.linears[name].in_dim == 1 else got.T
        assert torch.equal(got != 0, expected != 0)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert plan.provenance["repair"] == "sparsegpt"


def test_the_damping_that_a_method_is_given_counts():
    model = zoo.llama(num_hidden_layers=1)
    host, data = secateur.open(model), batches(model)
    name = "model.layers.0.mlp.down_proj.weight"
    stats = host.collect(["gram"], data, weights=[name])
    found = {}
    for damp in (None, 0.01, 100.0):
        method = repair.sparsegpt if damp is None else functools.partial(repair.sparsegpt, damp=damp)
        plan = secateur.prune(host, repair=method, pattern=Element(), budget=0.5, stats=stats, weights=[name])
        gram = prepare(stats.mean("gram", name), 0.01 if damp is None else damp)
        expected = repair.sparsegpt(host.read(name), gram, Element(), 0.5)
        np.testing.assert_array_equal(plan.weights[name], expected.numpy())
        found[damp] = plan.weights[name]
    np.testing.assert_array_equal(found[None], found[0.01])
    assert (found[100.0] != found[0.01]).any()


@pytest.mark.slow
def test_linears_that_read_the_same_tensor_share_one_gram():
    model = zoo.llama(num_hidden_layers=2)
    host, data = secateur.open(model), batches(model)
    names = default_weights(host.layout)
    stats = host.collect(["gram"], data, weights=names)
    assert len(names) == 14
    assert len(stats.sums["gram"]) == 8  # q k v, o, gate up, down
    readers = host.layout.readers(names)
    for name in names:
        x = inputs_of(model, name.removesuffix(".weight"), data)
        gram = stats.mean("gram", readers[name])
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert stats.counts["gram"][readers[name]] == sum(int(b["attention_mask"].sum()) for b in data)


@pytest.mark.slow
def test_apply_hold_resize_save_and_load(tmp_path):
    model = zoo.bert(num_hidden_layers=2)
    host, data = secateur.open(model), batches(model)
    dense = host.outputs(data[0])
    plan = secateur.prune(host, repair=repair.best, pattern=Element(), budget=0.5, data=data)
    plain = Plan(masks=plan.masks)
    np.testing.assert_array_equal(host.outputs(data[0])[0], dense[0])  # nothing has changed yet
    with host.masked(plan):
        repaired = host.outputs(data[0])
    with host.masked(plain):
        masked = host.outputs(data[0])
    np.testing.assert_array_equal(host.outputs(data[0])[0], dense[0])
    assert np.abs(repaired[0] - dense[0]).sum() < np.abs(masked[0] - dense[0]).sum()
    assert secateur.verify(host, plan, data).difference <= 1e-6
    trained = host.copy()
    with trained.hold(plan):
        np.testing.assert_array_equal(trained.outputs(data[0])[0], repaired[0])
        optimizer = torch.optim.SGD(trained.model.parameters(), lr=0.1)
        trained.model(**data[0]).logits.square().sum().backward()
        optimizer.step()
    after = trained.outputs(data[0])
    assert np.abs(after[0] - repaired[0]).max() > 1e-3
    trained.resize(plan)  # what was trained since is not undone
    np.testing.assert_array_equal(trained.outputs(data[0])[0], after[0])
    for name, mask in plan.masks.items():
        assert not to_numpy(trained.read(name))[~mask].any()
    host.resize(plan)
    host.save(tmp_path / "out", plan)
    loaded = secateur.torch.files.saving.load(tmp_path / "out")
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(**data[0]).logits.numpy(), repaired[0])
    assert not Plan.load(tmp_path / "out").weights
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.weights.keys() == plan.weights.keys()
    for name, array in plan.weights.items():
        np.testing.assert_array_equal(again.weights[name], array)


def test_weights_that_are_mended_replace_those_that_were_only_masked():
    host = secateur.open(zoo.llama(num_hidden_layers=1))
    data, name = batches(host.model), "model.layers.0.mlp.up_proj.weight"
    first = secateur.prune(host, criteria.magnitude, NM(2, 4))
    mended = secateur.prune(host, criteria.magnitude, NM(2, 4), data=data, repair=repair.least_squares)
    np.testing.assert_array_equal(first.masks[name], mended.masks[name])
    host.apply(first)
    other = host.copy()
    host.apply(mended)
    np.testing.assert_array_equal(to_numpy(host.read(name)), mended.weights[name])
    host.read(name).mul_(2)  # a training, which no plan undoes
    for undo in (host.apply, host.resize, host.apply):
        undo(mended)
        host.apply(first)
        np.testing.assert_array_equal(to_numpy(host.read(name)), 2 * mended.weights[name])
    with other.hold(mended):
        np.testing.assert_array_equal(to_numpy(other.read(name)), mended.weights[name])
        other.read(name).mul_(2)
    other.resize(mended)
    np.testing.assert_array_equal(to_numpy(other.read(name)), 2 * mended.weights[name])


@pytest.mark.parametrize("budget", [0.6, secateur.Global(0.6), secateur.OWL(0.6), secateur.PerKind(0.6)], ids=repr)
def test_budgets(budget):
    host = FakeHost()
    plan = secateur.prune(host, repair=repair.sparsegpt, pattern=Element(), budget=budget, data=[1, 2])
    zeros = sum(int((~mask).sum()) for mask in plan.masks.values())
    assert abs(zeros - round(0.6 * sum(mask.size for mask in plan.masks.values()))) <= len(plan.masks)
    for name, mask in plan.masks.items():
        assert not plan.weights[name][~mask].any()


def test_a_criterion_chooses_and_least_squares_mends():
    host = FakeHost()
    both = secateur.prune(host, criteria.magnitude, Element(), 0.5, data=[1], repair=repair.least_squares)
    alone = secateur.prune(host, criteria.magnitude, Element(), 0.5)
    for name, mask in alone.masks.items():
        np.testing.assert_array_equal(both.masks[name], mask)
        assert np.abs(both.weights[name] - host.arrays[name] * mask).max() > 1e-3


def test_a_weight_of_three_dimensions_is_repaired_as_a_matrix():
    """(head, v, hidden) contracts two dimensions, as attention kernels of Keras do; (hidden, head, v) contracts one."""
    text = "axes\n  head 2 head\n  v 3 v\n  hidden 4 hidden\nparameters\n"
    text += "  out : head v hidden < x0 0,1\n  query : hidden head v < x1 0"
    host, rng = FakeHost(), np.random.default_rng(0)
    host.layout = secateur.Layout.from_text(text)
    host.arrays = {name: rng.normal(size=host.layout.shape(name)) for name in host.layout.params}
    x = {"out": rng.normal(size=(50, 6)), "query": rng.normal(size=(50, 4))}
    stats = secateur.Stats({"gram": {k: v.T @ v for k, v in x.items()}}, {"gram": dict.fromkeys(x, 50.0)})
    plan = secateur.prune(host, repair=repair.sparsegpt, pattern=NM(1, 2), stats=stats, weights=["*"])
    matrix = {"out": host.arrays["out"].reshape(6, 4).T, "query": host.arrays["query"].reshape(4, 6).T}
    for name, rows in matrix.items():
        expected = repair.sparsegpt(np.ascontiguousarray(rows), stats.mean("gram", name), NM(1, 2))
        np.testing.assert_allclose(plan.weights[name], expected.T.reshape(plan.weights[name].shape))
        np.testing.assert_array_equal(plan.masks[name], plan.weights[name] != 0)


def test_errors():
    host = FakeHost()
    with pytest.raises(DataError, match="repair needs gram; pass data"):
        secateur.prune(host, repair=repair.sparsegpt, pattern=NM(1, 2))
    with pytest.raises(PlanError, match="repair prunes single weights, N:M groups or blocks, not ffn"):
        secateur.prune(host, repair=repair.sparsegpt, pattern=Unit("ffn"), budget=0.5, data=[1])
    with pytest.raises(PlanError, match="sparsegpt chooses by itself what stays"):
        secateur.prune(host, criteria.magnitude, Element(), 0.5, data=[1], repair=repair.sparsegpt)
    with pytest.raises(PlanError, match="needs a sparsity"):
        secateur.prune(host, repair=repair.sparsegpt, pattern=Block(1, 2), data=[1])
    with pytest.raises(PlanError, match="prune needs a pattern, and a criterion or a repair"):
        secateur.prune(host, pattern=Element())
