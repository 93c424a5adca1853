"""Opening: folders, names, and models that torch.nn.utils.prune has pruned."""

import json

import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune

import secateur
from secateur import Element, Plan, criteria
from secateur.cost import parameters, unit_parameters
from secateur.errors import ModelError
from secateur.torch.files import saving
from tests import zoo

NAMES = ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"]


def test_masks_of_torch_become_the_plan(tmp_path):
    model = zoo.bert(num_hidden_layers=1)
    masks = {}
    for path in NAMES:
        torch_prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.4)
        masks[f"{path}.weight"] = model.get_submodule(path).weight_mask.bool().numpy().copy()
    before = zoo.logits(model)
    host = secateur.open(model)
    assert set(host.plan.masks) == set(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(host.plan.masks[name], mask)
    assert torch.equal(zoo.logits(model), before)
    assert not any(name.endswith(("_orig", "_mask")) for name in model.state_dict())

    plan = host.plan.merge(secateur.prune(host, criteria.magnitude, Element(), 0.6))
    host.apply(plan)
    for name, mask in masks.items():
        assert not plan.masks[name][~mask].any()
        assert int((host.read(name) == 0).sum()) == round(0.6 * mask.size)
    host.save(tmp_path / "out", plan)
    assert torch.equal(zoo.logits(saving.load(tmp_path / "out")), zoo.logits(model))


def test_zeros_become_the_plan_and_are_held_through_resize():
    model = zoo.bert(num_hidden_layers=1)
    host = secateur.open(model)
    assert host.plan is None
    plan = secateur.prune(host, criteria.magnitude, Element(), 0.6)
    host.apply(plan)
    fresh = model.classifier.weight  # zero throughout: it begins there, and is left free
    fresh.data.zero_()
    again = secateur.open(model)
    assert set(again.plan.masks) == set(plan.masks)
    for name, mask in plan.masks.items():
        np.testing.assert_array_equal(again.plan.masks[name], mask)
    again.resize(Plan(keep={"L0.ffn": np.arange(0, 48, 2), "L0.head": np.array([0, 2, 3])}))
    linears = {name: again.read(name).clone() for name in plan.masks}
    with again.hold(Plan()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # behind a head of zeros, gradients begin with the second step
            model(**again.example).logits[:, 0].sum().backward()
            optimizer.step()
    assert (fresh[0] != 0).all()
    for name, before in linears.items():
        assert torch.equal(again.read(name) == 0, before == 0)
    assert not torch.equal(again.read(f"{NAMES[0]}.weight"), linears[f"{NAMES[0]}.weight"])


def test_a_few_zeros_are_no_pruning():
    model = zoo.bert(num_hidden_layers=1)
    weight = model.get_submodule(NAMES[0]).weight  # 48 x 32
    weight.data.view(-1)[:15] = 0
    assert secateur.open(model).plan is None
    weight.data.view(-1)[:16] = 0
    assert set(secateur.open(model).plan.masks) == {f"{NAMES[0]}.weight"}


def test_a_mask_that_nothing_applies():
    model = zoo.bert(num_hidden_layers=1)
    linear = model.get_submodule(NAMES[0])
    torch_prune.l1_unstructured(linear, "weight", amount=0.4)
    linear._forward_pre_hooks.clear()
    with pytest.raises(ModelError, match="has a mask but no hook"):
        secateur.open(model)


def test_folders_and_names(tmp_path):
    model = zoo.bert(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model")):
        host = secateur.open(source)
        assert torch.equal(zoo.logits(host.model), zoo.logits(model))
    for source, message in (
        (tmp_path / "absent", "does not exist; pass a model folder"),
        ("no-such-org/no-such-model", "no model of that name could be loaded"),
        (tmp_path / "model" / "config.json", "is not a folder"),
        (3, "cannot open a int"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            secateur.open(source)
        assert "\n" not in str(caught.value)


def test_a_module_needs_an_example():
    with pytest.raises(ModelError, match="a Linear needs an example batch"):
        secateur.open(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("config", [{}, {"transformers_weights": "adapter_model.bin"}])
def test_pickled_weights_of_a_hub_id_stay_closed(tmp_path, monkeypatch, config):
    from huggingface_hub import constants

    from secateur.torch.open import load_model

    model, cache = zoo.bert(num_hidden_layers=1), tmp_path / "models--org--pick"
    snapshot = cache / "snapshots" / "abc"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    model.config.save_pretrained(snapshot)
    if config:
        data = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**data, **config}))
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save(model.state_dict(), snapshot / name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(ModelError, match=r"org/pick holds pickled weights \(.*\), which can run code when opened"):
        load_model("org/pick", cache_dir=tmp_path)
    model.save_pretrained(snapshot)
    if not config:
        assert torch.equal(zoo.logits(load_model("org/pick", cache_dir=tmp_path)), zoo.logits(model))


def test_buffers_are_no_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    host = secateur.open(net.eval(), example=(torch.rand(4, 8),))
    (axis,) = [a.name for a in host.layout.axes.values() if a.size == 16]
    assert host.layout.buffers == {"1.running_mean", "1.running_var"}
    assert parameters(host.layout).total == sum(p.numel() for p in net.parameters()) == 210
    assert unit_parameters(host.layout, axis) == 8 + 1 + 2 + 2
    host.resize(Plan(keep={axis: np.arange(4)}))
    assert parameters(host.layout).total == sum(p.numel() for p in net.parameters()) == 54
    llama = zoo.llama(num_hidden_layers=1)
    assert parameters(secateur.open(llama).layout).total == sum(p.numel() for p in llama.parameters())


def test_a_host_in_double_computes_in_float64():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    x = torch.randn(3, 4)
    host = secateur.open(model, (x,))
    (single,), (double,) = host.outputs((x,)), host.in_double().outputs((x,))
    assert (single.dtype, double.dtype, next(model.parameters()).dtype) == (np.float32, np.float64, torch.float32)
    weights = [parameter.detach().double().numpy() for parameter in model.parameters()]
    wanted = np.tanh(x.double().numpy() @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
    np.testing.assert_allclose(double, wanted, rtol=1e-13)
    assert host.in_double().in_double() is None
    assert secateur.open(model.to(torch.bfloat16), (x.bfloat16(),)).in_double() is None
