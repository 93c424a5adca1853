"""SparseGPT against the textbook in-place loop, written here from the paper's formulas, in float64."""

import numpy as np
import pytest

from secateur import repair
from secateur.select import NM, Element

torch = pytest.importorskip("torch")


def layer(out=12, inputs=32, tokens=200, seed=0):
    """A weight and the gram of correlated inputs, float64."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    return rng.normal(size=(out, inputs)), x.T @ x / tokens


def textbook(weight, gram, pattern, sparsity, band, damp=0.01):
    w, h = weight.copy(), gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))
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
