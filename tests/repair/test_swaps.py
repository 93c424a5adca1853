"""Least squares and swaps against brute force."""

import itertools

import numpy as np
import pytest

from secateur import repair
from secateur.select import NM, Block, Element

from .layers import damped, fit, layer, loss

torch = pytest.importorskip("torch")
BOTH = pytest.mark.parametrize("to", [np.asarray, torch.tensor], ids=["numpy", "torch"])


@BOTH
def test_least_squares_equals_lstsq_on_the_support(to):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 24)) @ (np.eye(24) + 0.3 * rng.normal(size=(24, 24)))
    weight, mask = rng.normal(size=(9, 24)), rng.random((9, 24)) < 0.5
    got = np.asarray(repair.least_squares(to(weight), to(x.T @ x / 300), Element(), 0.5, start=to(mask), damp=0.0))
    assert not got[~mask].any()
    for row, kept, new in zip(weight, mask, got, strict=True):
        np.testing.assert_allclose(new[kept], np.linalg.lstsq(x[:, kept], x @ row, rcond=None)[0], rtol=1e-7)


@BOTH
def test_no_single_swap_lowers_the_loss(to):
    weight, gram = layer(out=6, inputs=16)
    got = np.asarray(repair.swaps(to(weight), to(gram), Element(), 0.5, passes=100))
    gram = damped(gram)
    for row, new in zip(weight, got, strict=True):
        kept = np.flatnonzero(new)
        now = loss(row[None], new[None], gram)
        np.testing.assert_allclose(new, fit(row, gram, kept), rtol=1e-7, atol=1e-12)
        for q, p in itertools.product(kept, np.flatnonzero(new == 0)):
            other = new.copy()
            other[q] = 0
            other[p] = gram[p] @ (row - other) / gram[p, p]
            assert loss(row[None], other[None], gram) >= now * (1 - 1e-7)


@BOTH
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(5, 8)], ids=str)
def test_no_other_pattern_of_a_group_lowers_the_loss(to, pattern):
    weight, gram = layer(out=4, inputs=16)
    got = np.asarray(repair.swaps(to(weight), to(gram), pattern, passes=100))
    gram = damped(gram)
    for row, new in zip(weight, got, strict=True):
        now = loss(row[None], new[None], gram)
        for start in range(0, 16, pattern.of):
            assert np.count_nonzero(new[start : start + pattern.of]) == pattern.keep
            for kept in itertools.combinations(range(start, start + pattern.of), pattern.keep):
                other = new.copy()
                other[start : start + pattern.of] = 0
                kept = list(kept)
                other[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], (gram @ (row - other))[kept])
                assert loss(row[None], other[None], gram) >= now * (1 - 1e-7)


@BOTH
def test_no_swap_of_blocks_lowers_the_loss(to):
    weight, gram = layer(out=4, inputs=12)
    got = np.asarray(repair.swaps(to(weight), to(gram), Block(2, 3), 0.5, passes=100))
    gram, alive = damped(gram), got.reshape(2, 2, 4, 3).any((1, 3))
    for stripe, blocks in enumerate(alive):
        dense, new = weight[2 * stripe : 2 * stripe + 2], got[2 * stripe : 2 * stripe + 2]
        for q, p in itertools.product(np.flatnonzero(blocks), np.flatnonzero(~blocks)):
            other = new.copy()
            other[:, 3 * q : 3 * q + 3] = 0
            here = slice(3 * p, 3 * p + 3)
            other[:, here] = (dense - other) @ gram[:, here] @ np.linalg.inv(gram[here, here])
            assert loss(dense, other, gram) >= loss(dense, new, gram) * (1 - 1e-7)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [(Element(), 0.6), (NM(2, 4), None), (NM(9, 18), None), (Block(2, 4), 0.5)], ids=str
)
def test_the_fast_form_equals_the_pure_one(pattern, sparsity):
    weight, gram = layer(out=16, inputs=72, seed=1)
    pure = repair.swaps(weight, gram, pattern, sparsity)
    for kind, last, tolerance in ((torch.float64, None, 1e-7), (torch.float32, 1e-6, 1e-4)):
        tensor = torch.tensor(weight, dtype=kind)
        got = repair.swaps(tensor, torch.tensor(gram), pattern, sparsity, tolerance=last).numpy()
        np.testing.assert_array_equal(got == 0, pure == 0)
        np.testing.assert_allclose(got, pure, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("start", [repair.magnitude, repair.wanda, repair.sparsegpt])
@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.7), (NM(2, 4), None), (Block(4, 1), 0.5)], ids=str)
def test_every_step_lowers_the_loss(start, pattern, sparsity):
    weight, gram = layer(out=16, inputs=48, seed=2)
    weight, gram = torch.tensor(weight), torch.tensor(gram)
    held = repair.prepare(gram)
    losses = [repair.layer_loss(weight, start(weight, held, pattern, sparsity), held)]
    losses.append(repair.layer_loss(weight, repair.least_squares(weight, held, pattern, sparsity, start=start), held))
    for passes in (1, 2, 4):
        new = repair.swaps(weight, held, pattern, sparsity, start=start, passes=passes)
        losses.append(repair.layer_loss(weight, new, held))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[2] < losses[1] < losses[0]
