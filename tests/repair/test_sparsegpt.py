"""SparseGPT against the textbook in-place loop, written here from the paper's formulas, in float64."""

import numpy as np
import pytest

from secateur import repair
from secateur.select import NM, Block, Element

from .layers import damped, layer, loss

torch = pytest.importorskip("torch")


def textbook(weight, gram, pattern, sparsity, band, damp=0.01):
    w, h = weight.copy(), damped(gram, damp)
    out, inputs = w.shape
    keep = np.ones(w.shape, dtype=bool)
    spent = 0
    for start in range(0, inputs, band):
        end = min(start + band, inputs)
        for j in range(start, end):
            # the inverse of what is left of H, one column after the other is eliminated
            left = np.linalg.inv(h[j:, j:])
            if isinstance(pattern, NM):
                if j % pattern.of == 0:
                    for row in range(out):
                        order = np.argsort(-score(w[row : row + 1], h, j, j + pattern.of)[0], kind="stable")
                        keep[row, j + order[pattern.keep :]] = False
            elif j == start:
                scores = score(w, h, start, end)
                goal = round(out * end * sparsity)
                order = np.argsort(scores.reshape(-1), kind="stable")[: goal - spent]
                keep[:, start:end].reshape(-1)[order] = False
                flat = keep[:, start:end].copy().reshape(-1)
                flat[order] = False
                keep[:, start:end] = flat.reshape(out, -1)
                spent = goal
            gone = ~keep[:, j]
            change = np.where(gone, w[:, j], 0.0) / left[0, 0]
            w[:, j:] -= change[:, None] * left[0]
            w[gone, j] = 0.0
    return w


def score(w, h, start, end):
    """w_j^2 / [H_left^-1]_jj, where H_left is what is left when columns before j are gone."""
    return np.stack([w[:, j] ** 2 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(start, end)], axis=1)


@pytest.mark.parametrize("to", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [(Element(), 0.5), (Element(), 0.713), (NM(2, 4), None), (NM(1, 4), None), (NM(3, 8), None)],
)
def test_equals_the_textbook(to, pattern, sparsity):
    weight, gram = layer()
    expected = textbook(weight, gram, pattern, sparsity, 16)
    got = np.asarray(repair.sparsegpt(to(weight), to(gram), pattern, sparsity, columns=16))
    np.testing.assert_array_equal(got == 0, expected == 0)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pattern", "sparsity"), [(Element(), 0.6), (NM(2, 4), None), (Block(2, 4), 0.5)])
def test_the_fast_form_equals_the_pure_one(pattern, sparsity):
    weight, gram = layer(out=16, inputs=96, seed=1)
    pure = repair.sparsegpt(weight, gram, pattern, sparsity, columns=24)
    for kind, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        got = repair.sparsegpt(torch.tensor(weight, dtype=kind), torch.tensor(gram), pattern, sparsity, columns=24)
        np.testing.assert_array_equal(got.numpy() == 0, pure == 0)
        np.testing.assert_allclose(got.numpy(), pure, rtol=tolerance, atol=tolerance)


def test_mends_more_than_it_breaks():
    weight, gram = layer(out=16, inputs=64)
    mended = repair.sparsegpt(weight, gram, Element(), 0.5)
    assert loss(weight, mended, gram) < 0.8 * loss(weight, weight * (mended != 0), gram)
    assert repair.layer_loss(weight, mended, gram) == pytest.approx(loss(weight, mended, gram))
