"""What holds for every method: exact counts, dead inputs, bad grams, half precision, sparsity at the edges."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import repair
from secateur.errors import DataError, ModelError, PlanError
from secateur.select import NM, Block, Element, Unit

from .layers import fit, layer, loss

torch = pytest.importorskip("torch")
METHODS = [
    repair.magnitude,
    repair.wanda,
    repair.ria,
    repair.sparsegpt,
    repair.least_squares,
    repair.swaps,
    repair.alps,
    repair.best,
]
EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
PATTERNS = [
    (Element(), 0.37),
    (Element(), 0.9),
    (NM(2, 4), None),
    (NM(1, 8), None),
    (NM(6, 8), None),
    (Block(4, 1), 0.5),
    (Block(2, 8), 0.3),
]


def tensors(out=16, inputs=48, seed=0, dtype=torch.float32):
    weight, gram = layer(out, inputs, seed=seed)
    return torch.tensor(weight).to(dtype), torch.tensor(gram).float()


def check_counts(new, pattern, sparsity):
    alive = np.asarray(new) != 0
    if isinstance(pattern, NM):
        assert (alive.reshape(alive.shape[0], -1, pattern.of).sum(-1) == pattern.keep).all()
        return
    if isinstance(pattern, Block):
        shape = (alive.shape[0] // pattern.rows, pattern.rows, alive.shape[1] // pattern.columns, pattern.columns)
        alive = alive.reshape(shape)
        assert (alive.any((1, 3)) == alive.all((1, 3))).all()
        alive = alive.any((1, 3))
    assert (~alive).sum() == round(alive.size * sparsity)


@EVERY
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
def test_counts_are_exact(method, pattern, sparsity):
    weight, gram = tensors()
    before = weight.clone()
    new = method(weight, gram, pattern, sparsity)
    assert new.shape == weight.shape
    assert new.dtype == weight.dtype
    assert torch.equal(weight, before)
    check_counts(new, pattern, sparsity)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 10**6), st.sampled_from(METHODS[1:7]))
def test_counts_are_exact_in_any_shape(out, inputs, sparsity, seed, method):
    weight, gram = layer(out, inputs, seed=seed)
    check_counts(method(weight, gram, Element(), sparsity), Element(), sparsity)


def test_wanda_compares_within_a_row_and_magnitude_over_the_matrix():
    weight, gram = layer(out=6, inputs=20)
    weight[0] *= 100
    assert ((repair.wanda(weight, gram, Element(), 0.5) == 0).sum(1) == 10).all()
    assert (repair.magnitude(weight, gram, Element(), 0.5)[0] != 0).all()
    scores = np.abs(weight) * np.sqrt(np.diag(gram))
    expected = scores >= np.sort(scores, axis=1)[:, 10:11]
    np.testing.assert_array_equal(repair.wanda(weight, gram, Element(), 0.5) != 0, expected)


@EVERY
@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.5), (NM(2, 4), None), (Block(1, 4), 0.5)], ids=str)
def test_dead_inputs(method, pattern, sparsity):
    """An input that is always zero is pruned first; what the pattern makes stay keeps its dense value."""
    weight, gram = layer(out=8, inputs=24)
    dead = [0, 1, 2, 3, 9, 17]
    gram[dead] = gram[:, dead] = 0
    new = method(weight, gram, pattern, sparsity)
    check_counts(new, pattern, sparsity)
    assert np.isfinite(new).all()
    if method is not repair.magnitude:
        if isinstance(pattern, Element):
            assert not new[:, dead].any()
        kept = new[:, dead] != 0
        np.testing.assert_array_equal(new[:, dead][kept], weight[:, dead][kept])


@EVERY
def test_all_inputs_dead(method):
    weight, _ = layer(out=4, inputs=8)
    new = method(weight, np.zeros((8, 8)), Element(), 0.5)
    check_counts(new, Element(), 0.5)
    np.testing.assert_array_equal(new[new != 0], weight[new != 0])


@EVERY
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(method, kind):
    weight, gram = tensors(dtype=kind)
    new = method(weight, gram, NM(2, 4))
    assert new.dtype == kind
    check_counts(new.float(), NM(2, 4), None)
    np.testing.assert_array_equal(new.float(), method(weight.float(), gram, NM(2, 4)).to(kind).float())


def test_a_gram_that_is_shared_is_damped_once_for_each_damping():
    gram = repair.prepare(np.diag([1.0, 3.0]))
    np.testing.assert_allclose(np.diag(gram.matrix), [1.02, 3.02])
    assert repair.prepare(gram) is gram
    assert repair.prepare(gram, 0.01) is gram
    other = repair.prepare(gram, 1)
    np.testing.assert_allclose(np.diag(other.matrix), [3.0, 5.0])
    assert repair.prepare(gram, 1.0) is other
    for damp in (-1, "x", float("nan"), float("inf")):
        for either in (gram, np.eye(2)):
            with pytest.raises(PlanError, match="is no number from 0 upwards"):
                repair.prepare(either, damp)


@pytest.mark.parametrize("method", METHODS[3:], ids=lambda m: m.__name__)
def test_a_gram_of_few_tokens_is_damped(method):
    weight, gram = layer(out=8, inputs=32, tokens=10)
    new = method(weight, gram, Element(), 0.5)
    assert np.isfinite(new).all()
    assert loss(weight, new, gram) < loss(weight, repair.wanda(weight, gram, Element(), 0.5), gram)


@pytest.mark.parametrize("method", METHODS[3:7], ids=lambda m: m.__name__)
@pytest.mark.parametrize("to", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_a_gram_that_is_not_positive_definite_is_damped_and_said(method, to):
    weight, gram = layer(out=8, inputs=16)
    gram = gram - 1.5 * np.linalg.eigvalsh(gram)[0] * np.eye(16)
    with pytest.warns(RuntimeWarning, match=r"not positive definite: [\d.e-]+ \(.*\) was added"):
        new = method(to(weight), to(gram), Element(), 0.5, damp=1e-6)
    check_counts(new, Element(), 0.5)
    assert np.isfinite(np.asarray(new)).all()


def test_a_good_gram_warns_of_nothing_and_is_factorised_once():
    weight, gram = tensors()
    held = repair.prepare(gram)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            assert torch.equal(method(weight, held, NM(2, 4)), method(weight, gram, NM(2, 4)))
    assert held.upper is held.upper
    np.testing.assert_allclose(held.upper.T @ held.upper, torch.linalg.inv(held.matrix), rtol=1e-6, atol=1e-9)


def test_a_numpy_gram_serves_a_tensor():
    weight, gram = tensors()
    new = repair.sparsegpt(weight, gram.numpy(), Element(), 0.5)
    assert torch.equal(new, repair.sparsegpt(weight, gram, Element(), 0.5))


@EVERY
def test_bad_input(method):
    weight, gram = layer(out=4, inputs=8)
    with pytest.raises(DataError, match="the gram is NaN or infinite"):
        method(weight, np.where(gram == gram[1, 2], np.nan, gram), Element(), 0.5)
    with pytest.raises(DataError, match="the gram is of 8 inputs, the weight has 7"):
        method(weight[:, :7], gram, Element(), 0.5)
    with pytest.raises(DataError, match="a gram has shape"):
        method(weight, gram[:3], Element(), 0.5)
    with pytest.raises(DataError, match="on its diagonal"):
        method(weight, -gram, Element(), 0.5)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        method(np.where(weight == weight[0, 0], np.inf, weight), gram, Element(), 0.5)
    with pytest.raises(PlanError, match="needs a sparsity"):
        method(weight, gram, Element())
    with pytest.raises(PlanError, match=r"sparsity 1.0 is outside"):
        method(weight, gram, Element(), 1.0)
    with pytest.raises(PlanError, match="8 inputs, not a multiple of 3"):
        method(weight, gram, NM(1, 3))
    with pytest.raises(PlanError, match="is its own budget"):
        method(weight, gram, NM(2, 4), 0.7)
    with pytest.raises(PlanError, match="blocks of 3x1 do not divide"):
        method(weight, gram, Block(3, 1), 0.5)
    with pytest.raises(PlanError, match="not head"):
        method(weight, gram, Unit("head"), 0.5)


def test_a_penalty_that_would_not_rise_is_refused():
    weight, gram = np.ones((4, 8), dtype=np.float32), np.eye(8, dtype=np.float32)
    for options in ({"rho": 0.0}, {"growth": 0.5}):
        with pytest.raises(PlanError, match="the penalty begins above 0 and does not shrink, unlike rho"):
            repair.alps(weight, gram, Element(), 0.5, **options)


def test_bad_starts():
    weight, gram = layer(out=4, inputs=8)
    for method in (repair.least_squares, repair.swaps, repair.alps):
        with pytest.raises(PlanError, match="start has shape"):
            method(weight, gram, NM(2, 4), start=weight[:2])
        with pytest.raises(PlanError, match="start keeps 4 of 4"):
            method(weight, gram, NM(2, 4), start=weight)


@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.5), (NM(2, 4), None)], ids=str)
def test_alps_is_better_than_sparsegpt_and_fits_its_support(pattern, sparsity):
    weight, gram = layer(out=24, inputs=64, seed=3)
    held = repair.prepare(gram)
    matrix = np.asarray(held.matrix)
    losses = {m: loss(weight, m(weight, held, pattern, sparsity), matrix) for m in METHODS[3:]}
    assert losses[repair.best] < losses[repair.swaps] < losses[repair.least_squares] < losses[repair.sparsegpt]
    assert losses[repair.alps] < 0.85 * losses[repair.sparsegpt]
    new = repair.alps(weight, held, pattern, sparsity)
    for row, got in zip(weight, new, strict=True):
        np.testing.assert_allclose(got, fit(row, matrix, np.flatnonzero(got)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.6), (NM(2, 4), None), (Block(2, 4), 0.5)], ids=str)
def test_alps_on_tensors_equals_the_pure_form(pattern, sparsity):
    weight, gram = layer(out=16, inputs=72, seed=1)
    pure = repair.alps(weight, gram, pattern, sparsity)
    for fast in (True, False):
        got = repair.alps(torch.tensor(weight), torch.tensor(gram), pattern, sparsity, fast=fast).numpy()
        np.testing.assert_array_equal(got == 0, pure == 0)
        np.testing.assert_allclose(got, pure, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", [repair.sparsegpt, repair.swaps], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.6), (NM(2, 4), None)], ids=str)
def test_without_compiled_loops(monkeypatch, method, pattern, sparsity):
    from secateur.torch import repair_loops as fast

    weight, gram = layer(out=16, inputs=48)
    expected = method(torch.tensor(weight), torch.tensor(gram), pattern, sparsity)
    monkeypatch.setattr(fast, "kernels", lambda: None)
    got = method(torch.tensor(weight), torch.tensor(gram), pattern, sparsity)
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-9)
