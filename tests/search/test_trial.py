"""The divergence of a candidate is that of the model from which its units are really removed."""

import numpy as np
import pytest
import torch

from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.search.candidate import Candidate, layer_of_axes
from secateur.search.choosing.trial import Trial, best_of, is_better, weights_of
from secateur.tasks.base.evaluate import Reference, evaluate
from tests.search import rows as tiny


def first_units(host):
    """A `plan_of` that keeps the first units of each axis, and weights a tenth larger in what reads them."""

    def plan_of(candidate):
        keep = {axis: np.arange(count) for axis, count in candidate.kept.items()}
        for axis, gone in candidate.dropped.items():
            keep[axis] = np.setdiff1d(np.arange(host.layout.axis(axis).size), gone)
        plan = Plan(keep=keep)
        reading = [name for name in weights_of(host, plan) if name in host.layout.linears]
        return Plan(keep=keep, weights={name: 1.1 * host.read(name).numpy() for name in reading})

    return plan_of


def candidates_of(host):
    """One candidate for each kind of axis, one with several axes, and one with a layer gone."""
    found = [Candidate({axis.name: axis.size // 2}) for axis in host.layout.axes.values() if useful(axis)]
    inside = layer_of_axes(host.layout)
    (layers,) = host.layout.of_kind("layer")
    rest = {a.name: a.size // 2 for a in host.layout.of_kind("ffn") if inside[a.name][1] != 0}
    return [*found[:6], Candidate(rest), Candidate(rest, {layers.name: (0,)})]


def useful(axis):
    return axis.frozen is None and not axis.parts and axis.kind in ("head", "kv", "ffn") and axis.size > 1


@pytest.mark.parametrize("make", [tiny.classifier, tiny.llama])
def test_the_divergence_is_that_of_the_resized_model(tmp_path, make):
    host, task, rows = make(tmp_path)
    before = {name: p.clone() for name, p in host.model.named_parameters()}
    trial = Trial(host, task, rows.search, first_units(host))
    candidates = candidates_of(host)
    assert len(candidates) >= 4
    for candidate in [*candidates, candidates[0]]:
        small = host.copy()
        plan = trial.plan_of(candidate)
        small.apply(plan)
        small.resize(plan)
        wanted = evaluate(task, small.model, rows.search, trial.reference).kl
        assert wanted > 1e-4
        assert trial.divergence(candidate) == pytest.approx(wanted, rel=1e-4)
    with trial.written(Candidate()) as copy:  # nothing of earlier candidates is left
        assert all(torch.equal(p, before[name]) for name, p in copy.model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in host.model.named_parameters())


@pytest.fixture
def measured(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    return host, Trial(host, task, rows.search, first_units(host))


def half(host, *numbers):
    axes = host.layout.of_kind("ffn")
    return Candidate({axes[i].name: axes[i].size // 2 for i in numbers})


def test_no_batch_runs_twice_for_a_candidate(measured):
    host, trial = measured
    few, candidate = trial.per_example(half(host, 0), 2), half(host, 0)
    assert trial.forward_passes == 2
    whole = trial.per_example(candidate)
    assert trial.forward_passes == len(trial) == 6
    np.testing.assert_array_equal(whole[: len(few)], few)
    assert trial.divergence(candidate) == whole.mean()
    assert trial.forward_passes == 6


def test_the_whole_model_diverges_by_nothing(measured):
    _, trial = measured
    assert trial.divergence(Candidate()) == pytest.approx(0, abs=1e-6)


def test_the_best_candidate_is_found_without_running_all_on_all_batches(measured):
    host, trial = measured
    candidates = [half(host, 0, 1), Candidate(), half(host, 0), half(host, 1)]
    assert best_of(trial, candidates) == Candidate()
    assert trial.forward_passes < len(candidates) * len(trial)


def test_a_reference_of_other_batches_is_refused(tmp_path):
    host, task, rows = tiny.classifier(tmp_path)
    with pytest.raises(PlanError, match="other batches"):
        Trial(host, task, rows.search, first_units(host), reference=Reference(task, host.model, rows.calibration))


def test_better_means_beyond_the_paired_standard_error():
    base = np.array([1.0, 5.0, 2.0, 8.0])
    assert is_better(base - 0.1, base)  # the same gain everywhere is certain, however the examples differ
    assert not is_better(base, base)
    noisy = base + np.array([1.0, -1.5, 1.0, -1.5])
    assert not is_better(noisy, base)  # mean -.25, standard error .72
    assert is_better(noisy, base, errors=0.3)
    assert not is_better(base + np.array([0, 0, 0, np.inf]), base)
    assert is_better(base, base + np.array([0, 0, 0, np.inf]))
