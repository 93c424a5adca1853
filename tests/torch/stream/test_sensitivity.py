"""Sparsity dealt out by what the loss bears: the sum is least, counts are exact, folder and memory agree."""

import itertools

import numpy as np
import pytest
import torch

from secateur.budget import least_loss
from secateur.errors import PlanError
from secateur.recipe import make_recipe
from secateur.torch.stream import run
from secateur.torch.stream.run import prune_folder, prune_loaded
from secateur.torch.stream.sensitivity import by_sensitivity
from tests import zoo
from tests.text_models import write_model
from tests.torch.language import windows


def test_least_loss_against_every_choice():
    shares = np.linspace(0.4, 0.8, 5)
    rates = np.sort(np.random.default_rng(0).uniform(0.1, 5, (3, 4)), axis=1)
    errors = np.concatenate([np.ones((3, 1)), 1 + np.cumsum(rates, axis=1)], axis=1)
    weights, sizes = np.array([1.0, 3.0, 0.2]), np.array([10, 10, 20])
    found = least_loss(errors, shares, sizes, weights, 0.6)
    assert np.average(found, weights=sizes) == pytest.approx(0.6)

    def loss(chosen):
        return sum(w * np.interp(s, shares, e) for w, s, e in zip(weights, chosen, errors, strict=True))

    grid = np.linspace(0.4, 0.8, 17)
    choices = [c for c in itertools.product(grid, repeat=3) if np.average(c, weights=sizes) >= 0.6 - 1e-9]
    assert loss(found) <= min(map(loss, choices)) + 1e-9
    assert loss(found) < loss([0.6] * 3)
    with pytest.raises(PlanError, match="sparsity 0.9 lies outside the shares 0.4 to 0.8"):
        least_loss(errors, shares, sizes, weights, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2])
def test_folder_and_memory_agree_to_the_last_zero(make, tmp_path, monkeypatch):
    model = write_model(tmp_path / "in", make)
    recipe = make_recipe(criterion="sparsegpt", sparsity=0.6, sensitivity=True, samples=6, context=16)
    found = []

    def stop(done):
        raise KeyboardInterrupt

    def allocate(*args):
        found.append(by_sensitivity(*args))
        return found[-1]

    monkeypatch.setattr(run, "by_sensitivity", allocate)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe, stop)
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe)
    assert report.resumed == len(found) == 1
    prune_loaded(model, windows(), recipe)
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert report.zeros == round(0.6 * report.weights)
    shares = [layer["zeros"] / layer["weights"] for layer in report.layers]
    assert 0.44 < min(shares) < 0.59 < 0.61 < max(shares) < 0.76


@pytest.mark.slow
def test_what_was_found_is_kept_before_the_first_block(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    recipe = make_recipe(criterion="alps", sparsity=0.6, sensitivity=True, reconstruct=True, distil=True, samples=6)

    def stop(*args):
        raise KeyboardInterrupt

    found = []
    allocate = run.by_sensitivity
    monkeypatch.setattr(run, "by_sensitivity", lambda *a: found.append(allocate(*a)) or found[-1])
    with monkeypatch.context() as patched:
        patched.setattr(run, "_one_block", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe)
    told = []
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe, survey=lambda *step: told.append(step))
    assert len(found) == 1
    assert not told
    assert report.zeros == round(0.6 * report.weights)
    assert report.distilled is not None


@pytest.mark.slow
def test_what_cannot_be(tmp_path):
    with pytest.raises(PlanError, match="leave out sensitivity"):
        make_recipe(pattern="2:4", sensitivity=True)
    with pytest.raises(PlanError, match="owl and sensitivity both"):
        make_recipe(sparsity=0.5, owl=True, sensitivity=True)
    write_model(tmp_path / "in")
    with pytest.raises(PlanError, match=r"sensitivity holds the dense model, .* more than 0.0 GiB"):
        recipe = make_recipe(sparsity=0.5, sensitivity=True, memory=10**5)
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe)
