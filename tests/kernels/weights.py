"""Sparse weights of each pattern, and what a product with them should be."""

import numpy as np


def sparse(rows, cols, density, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, cols), dtype=np.float32) * (rng.random((rows, cols)) < density)


def dense(weight, x, bias=None):
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return y if bias is None else y + bias


def close(got, expected, weight, x):
    bound = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    return np.all(np.abs(got - expected) <= 1e-6 * bound + 1e-6)


def blocked(rows, cols, density, block, seed=0):
    rng = np.random.default_rng(seed)
    keep = np.repeat(rng.random((-(-rows // block), cols)) < density, block, axis=0)[:rows]
    return rng.standard_normal((rows, cols), dtype=np.float32) * keep


def in_quads(rows, cols, density, seed=0):
    return np.ascontiguousarray(blocked(cols, rows, density, 4, seed).T)


def in_groups(rows, cols, keep, of, density=1.0, seed=0):
    rng = np.random.default_rng(seed)
    chosen = rng.random((rows, -(-cols // of), of)).argsort(-1) < keep
    kept = chosen.reshape(rows, -1)[:, :cols] & (rng.random((rows, cols)) < density)
    return rng.standard_normal((rows, cols), dtype=np.float32) * kept
