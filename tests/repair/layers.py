"""Small layers for the tests of repair, and the losses of brute force, in numpy and float64."""

import numpy as np


def layer(out=12, inputs=32, tokens=200, seed=0):
    """A weight (out, in) and the gram of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    return rng.normal(size=(out, inputs)), x.T @ x / tokens


def damped(gram, damp=0.01):
    return gram + damp * np.mean(np.diag(gram)) * np.eye(len(gram))


def fit(row, gram, support):
    """The best row on a support: normal equations."""
    best = np.zeros_like(row)
    best[support] = np.linalg.solve(gram[np.ix_(support, support)], (gram @ row)[support])
    return best


def loss(dense, new, gram):
    return float(np.einsum("oi,ij,oj->", dense - new, gram, dense - new))
