"""The nm format against a float64 product, the quad format against integers, on each instruction set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.kernels import packing as P
from secateur.kernels import reference
from secateur.kernels.format import GROUPS, MAX_QUAD_COLUMNS, VALUES, describe
from secateur.kernels.native import available_isas, load_native
from tests.kernels.weights import close, dense, in_groups, in_quads

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")
ISAS = available_isas()


def rounded_product(weight, x):
    """What the quad format computes, in integers: both sides rounded, a scale a row and a scale a token."""
    scale = np.abs(weight).max(1) / np.float32(127)
    q = np.rint(weight / np.where(scale > 0, scale, 1)[:, None]).astype(np.int64)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    step = np.maximum(np.float32(1e-36), high / np.float32(255) - low / np.float32(255))
    inverse = np.float32(1) / step
    zero = np.clip(np.rint(-low * inverse), 0, 255).astype(np.int64)[:, None]
    levels = np.clip(np.rint(x * inverse[:, None]).astype(np.int64) + zero, 0, 255) - zero
    return (levels @ q.T).astype(np.float32) * (scale[None] * step[:, None])


@pytest.mark.parametrize("name", ISAS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    tile=st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128]),
    chunk=st.sampled_from([4, 28, 256]),
    row_block=st.sampled_from([1, 5, 32, 512]),
    threads=st.integers(1, 3),
    size=st.sampled_from([0.0, 1e-38, 1.0, 1e30, 3e38]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_quad_equals_a_product_of_integers(
    name, *, rows, cols, tokens, density, tile, chunk, row_block, threads, size, seed
):
    rng = np.random.default_rng(seed)
    weight = in_quads(rows, cols, density, seed)
    x = rng.uniform(-1, rng.integers(2), (tokens, cols)).astype(np.float32) * np.float32(size)
    blob = P.pack(weight, format="quad", value="int8", tile=tile, chunk=chunk, row_block=row_block)
    P.validate(blob)
    assert np.array_equal(P.unpack(blob), reference.unpack(blob))
    with np.errstate(over="ignore"):
        expected = rounded_product(weight, x)
    assert np.array_equal(P.linear(blob, x, threads=threads, isa=name), expected)


@pytest.mark.parametrize("name", ISAS)
def test_quad_is_near_the_float_product(name):
    weight, bias = in_quads(200, 768, 0.2), np.random.default_rng(1).standard_normal(200, dtype=np.float32)
    raw = np.random.default_rng(2).standard_normal((140, 800), dtype=np.float32)
    x = raw[::2, 5:773]
    expected = dense(weight, x, bias)
    y = P.linear(P.pack(weight, format="quad", value="int8", tile=64), x, bias, isa=name)
    assert np.linalg.norm(y - expected) < 0.015 * np.linalg.norm(expected)
    exact = reference._ACTIVATE["gelu"](y.astype(np.float64))
    y = P.linear(P.pack(weight, format="quad", value="int8", tile=64), x, bias, activation="gelu", isa=name)
    assert np.allclose(y, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ISAS)
def test_quad_sums_of_the_longest_rows_do_not_overflow(name):
    weight = np.ones((2, MAX_QUAD_COLUMNS), np.float32)
    weight[1] = -1
    x = np.repeat(np.array([[3.0], [-2.0], [0.5]], np.float32), MAX_QUAD_COLUMNS, axis=1)
    y = P.linear(P.pack(weight, format="quad", value="int8", chunk=128), x, isa=name)
    assert np.allclose(y, dense(weight, x), rtol=1e-6)
    with pytest.raises(ValueError, match="at most 65536 columns"):
        P.pack(np.ones((1, MAX_QUAD_COLUMNS + 1), np.float32), format="quad", value="int8")


@pytest.mark.parametrize("name", ISAS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    tokens=st.integers(1, 20),
    groups=st.sampled_from(GROUPS),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    value=st.sampled_from(VALUES),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_nm_equals_a_float64_product(name, *, rows, cols, tokens, groups, density, value, with_bias, threads, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32) if with_bias else None
    keep, of = groups
    weight = in_groups(rows, cols, keep, of, density, seed)
    blob = P.pack(weight, format="nm", keep=keep, of=of, value=value)
    P.validate(blob)
    stored = P.unpack(blob)
    assert np.array_equal(stored, reference.unpack(blob))
    assert describe(blob).nonzeros == np.count_nonzero(weight)
    assert value != "float32" or np.array_equal(stored, weight)
    y = P.linear(blob, x, bias, threads=threads, isa=name)
    assert close(y, dense(stored, x, bias), stored, x)


def test_a_weight_that_is_not_nm_is_refused():
    with pytest.raises(ValueError, match="the nm format has no 3:4; use one of 1:4, 2:4, 4:8"):
        P.pack(in_groups(4, 8, 2, 4), format="nm", keep=3)
    with pytest.raises(ValueError, match="not 2:4: some 4 consecutive weights"):
        P.pack(np.ones((4, 7), np.float32), format="nm")
    full = np.ones((4, 2), np.float32)
    assert np.array_equal(P.unpack(P.pack(full, format="nm")), full)
