"""Healing gains on search rows, or leaves the weights as they were and says so."""

import json

import pytest
import torch

from secateur.plan import Plan
from secateur.search.heal import heal, short_heal, step_seconds
from secateur.tasks.base.evaluate import Reference, evaluate
from tests.search import rows as tiny


def cut(host):
    """A copy of the host with a quarter of its FFN units."""
    small = host.copy()
    small.resize(Plan(keep={axis.name: range(axis.size // 4) for axis in host.layout.of_kind("ffn")}))
    return small


def state(host):
    return {name: p.detach().clone() for name, p in host.model.named_parameters()}


@pytest.mark.parametrize("make", [tiny.texts_alone, tiny.llama])
def test_a_pruned_model_comes_nearer_to_the_dense_one(tmp_path, make):
    host, task, rows = make(tmp_path)
    small, dense = cut(host), state(host)
    healed = heal(small, host, task, rows, rounds=2, learning_rate=1e-3)
    assert len(healed.rounds) == 2
    assert healed.refused is None
    assert healed.after.divergence < 0.95 * healed.before.divergence
    assert healed.after.divergence == min(one.divergence for one in healed.rounds)
    again = evaluate(task, small.model, rows.search, Reference(task, host.model, rows.search))
    assert again.kl == pytest.approx(healed.after.divergence)
    assert json.loads(json.dumps(healed.as_json()))["rounds"][0]["epochs"] == 1.0
    assert all(torch.equal(p, dense[name]) for name, p in host.model.named_parameters())


def test_training_that_makes_it_worse_is_undone_after_a_second_try_at_a_third(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    small = cut(host)
    before = state(small)
    healed = heal(small, host, task, rows, learning_rate=3.0)
    assert [one.learning_rate for one in healed.rounds] == [3.0, 1.0]
    assert healed.best == 0
    assert healed.after == healed.before
    assert "no round of training made it better" in healed.refused
    assert all(torch.equal(p, before[name]) for name, p in small.model.named_parameters())


def test_too_little_time_is_said(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    healed = heal(cut(host), host, task, rows, seconds=1e-6)
    assert healed.rounds == ()
    assert "do not suffice" in healed.refused


def test_a_drop_within_what_is_wanted_needs_no_training(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    healed = heal(cut(host), host, task, rows, wanted=1.0)
    assert healed.rounds == ()
    assert "is within what is wanted" in healed.refused


def test_zeros_are_held(tmp_path):
    host, task, rows = tiny.llama(tmp_path)
    small = host.copy()
    name = next(n for n in small.layout.linears if n.endswith("down_proj.weight"))
    mask = torch.rand(small.read(name).shape, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = Plan(masks={name: mask.numpy()})
    small.apply(plan)
    assert heal(small, host, task, rows, plan=plan, rounds=1, learning_rate=1e-3).refused is None
    assert not small.read(name)[~mask].any()


def test_a_short_healing_ranks_models_and_leaves_them_alone(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    half, whole = cut(host), host.copy()
    before = state(half)
    found = short_heal([half, whole, half], host, task, rows, steps=2, learning_rate=1e-5)
    assert found[0] == found[2] > found[1]
    assert all(torch.equal(p, before[name]) for name, p in half.model.named_parameters())


def test_the_time_of_a_step_is_measured_without_training(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    small = cut(host)
    before = state(small)
    assert step_seconds(small, host, task, rows) > 0
    assert all(torch.equal(p, before[name]) for name, p in small.model.named_parameters())
    assert all(p.grad is None for p in small.model.parameters())
