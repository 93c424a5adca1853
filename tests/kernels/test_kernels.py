"""The kernels against a float64 product: every instruction set of this machine, any shape, density and
layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.kernels import packing as P
from secateur.kernels import reference
from secateur.kernels.format import ACTIVATIONS, BLOCKS, VALUES, VALUES_OF, describe
from secateur.kernels.native import available_isas, isa, load_native
from tests.kernels.weights import blocked, close, dense, in_groups, sparse

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")
ISAS = available_isas()


QUAD = {"format": "quad", "value": "int8", "tile": 16, "chunk": 64, "row_block": 16}

NM = {"format": "nm"}


@pytest.mark.parametrize("name", ISAS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    tokens=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    tile=st.sampled_from([16, 32, 48, 64, 80, 128]),
    chunk=st.sampled_from([1, 7, 48, 64, 128]),
    row_block=st.sampled_from([1, 5, 32, 512]),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_tiled_equals_a_float64_product(
    name, *, rows, cols, tokens, density, tile, chunk, row_block, with_bias, threads, seed
):
    rng = np.random.default_rng(seed)
    weight = sparse(rows, cols, density, seed)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32) if with_bias else None
    blob = P.pack(weight, tile=tile, chunk=chunk, row_block=row_block)
    P.validate(blob)
    y = P.linear(blob, x, bias, threads=threads, isa=name)
    assert close(y, dense(weight, x, bias), weight, x)


@pytest.mark.parametrize("name", ISAS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    tokens=st.integers(1, 90),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    block=st.sampled_from(BLOCKS),
    value=st.sampled_from(VALUES),
    chunk=st.sampled_from([1, 7, 64, 384]),
    row_block=st.sampled_from([8, 32]),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_block_equals_a_float64_product(
    name, *, rows, cols, tokens, density, block, value, chunk, row_block, with_bias, threads, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32) if with_bias else None
    weight = blocked(rows, cols, density, block, seed)
    blob = P.pack(weight, format="block", block=block, value=value, chunk=chunk, row_block=row_block)
    P.validate(blob)
    stored = P.unpack(blob)
    y = P.linear(blob, x, bias, threads=threads, isa=name)
    assert close(y, dense(stored, x, bias), stored, x)


@pytest.mark.parametrize("name", ISAS)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    tokens=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0]),
    value=st.sampled_from(VALUES_OF["bitmask"]),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_bitmask_equals_a_float64_product(name, *, rows, cols, tokens, density, value, with_bias, threads, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    bias = rng.standard_normal(rows, dtype=np.float32) if with_bias else None
    blob = P.pack(sparse(rows, cols, density, seed), format="bitmask", value=value)
    P.validate(blob)
    stored = P.unpack(blob)
    y = P.linear(blob, x, bias, threads=threads, isa=name)
    assert close(y, dense(stored, x, bias), stored, x)


@pytest.mark.parametrize(
    "packing", [{"format": "block", "block": 4}, {"format": "block"}, {"format": "bitmask"}, QUAD, NM]
)
def test_stored_values_are_as_close_as_their_type(packing):
    weight = in_groups(37, 83, 2, 4)
    for value in VALUES_OF[packing["format"]]:
        blob = P.pack(weight, **{**packing, "value": value})
        info = describe(blob)
        assert (info.value, info.rows, info.cols, info.nonzeros) == (value, 37, 83, np.count_nonzero(weight))
        assert np.array_equal(P.unpack(blob), reference.unpack(blob))
        error = np.abs(P.unpack(blob) - weight)
        bound = {
            "float32": 0 * error,
            "bfloat16": np.abs(weight) * 2.0**-8,
            "float16": np.abs(weight) * 2.0**-11 + 2.0**-25,
            "int8": np.abs(weight).max(1, keepdims=True) / 127 * 0.5001 + 0 * error,
        }[value]
        assert np.all(error <= bound)


def test_float16_rounds_as_numpy_does():
    values = np.array([[1e-8, 6e-8, 3e-5, 6.2e-5, 1.0006, -65504.0, 2047.5, np.inf]], np.float32)
    blob = P.pack(np.ascontiguousarray(values), format="block", value="float16")
    assert P.unpack(blob).tolist() == values.astype(np.float16).astype(np.float32).tolist()


FORMATS = [{"format": "tiled"}, {"format": "block", "block": 4}, {"format": "block"}, {"format": "bitmask"}, QUAD, NM]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("packing", FORMATS[1:])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_not_finite_inputs_in_every_format(name, packing, tokens):
    weight = in_groups(40, 130, 2, 4, 0.4, seed=3) if packing == NM else blocked(40, 130, 0.4, 8, seed=3)
    weight[:, 8:12] *= packing != NM
    weight[:, 11] = np.abs(weight[:, 11]) + 1
    x = np.random.default_rng(0).standard_normal((tokens, 130), dtype=np.float32)
    x[tokens // 2, 11] = np.inf
    x[tokens - 1, 129] = np.nan
    with np.errstate(invalid="ignore"):
        expected = dense(weight, x)
    y = P.linear(P.pack(weight, **packing), x, isa=name)
    assert np.array_equal(np.isnan(y), np.isnan(expected))
    assert np.allclose(y, expected, rtol=1e-4, atol=0.4 if packing == QUAD else 1e-4, equal_nan=True)


@pytest.mark.parametrize("packing", FORMATS[1:])
def test_damage_in_every_format_is_refused_or_harmless(packing):
    blob = P.pack(in_groups(40, 130, 2, 4) if packing == NM else blocked(40, 130, 0.5, 8), **packing)
    with pytest.raises(ValueError, match="damaged"):
        P.validate(blob[:-64])
    refused = 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        hurt = blob.copy()
        hurt[rng.integers(8, min(hurt.size, 3000))] ^= rng.integers(1, 256, dtype=np.uint8)
        try:
            P.validate(hurt)
        except ValueError:
            refused += 1
            continue
        if describe(hurt).cols == 130:
            P.linear(hurt, np.ones((5, 130), np.float32))
    assert refused > (5 if packing == NM else 20)  # any index of nm is one of its group


def test_impossible_values_and_blocks_are_named():
    weight = sparse(4, 5, 0.5)
    with pytest.raises(ValueError, match="int8 cannot hold a NaN"):
        P.pack(np.full((4, 5), np.nan, np.float32), format="block", value="int8")
    with pytest.raises(ValueError, match="float16 cannot hold a weight of 70000"):
        P.pack(np.full((4, 5), 7e4, np.float32), format="block", value="float16")
    with pytest.raises(ValueError, match="'tiled' does not store int8"):
        P.pack(weight, value="int8")
    with pytest.raises(ValueError, match="block 3, chunk 384"):
        P.pack(weight, format="block", block=3)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_big_layers_on_two_threads(name, value):
    weight = sparse(515, 770, 0.15)
    blob = P.pack(weight, tile=64, chunk=128, value=value)
    stored = P.unpack(blob)
    x = np.random.default_rng(1).standard_normal((1100, 770), dtype=np.float32)
    assert close(P.linear(blob, x, threads=2, isa=name), dense(stored, x), stored, x)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 65)])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.6, 1.0])  # at 0.6 rows are filled up with zeros
def test_unpack_gives_the_weight_back_in_both_implementations(shape, density):
    weight = sparse(*shape, density)
    blob = P.pack(weight, tile=16, chunk=50, row_block=40)
    assert np.array_equal(P.unpack(blob), weight)
    assert np.array_equal(reference.unpack(blob), weight)
    info = describe(blob)
    assert (info.format, info.value, info.rows, info.cols) == ("tiled", "float32", *shape)
    assert info.nonzeros == np.count_nonzero(weight)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_rows_that_share_columns(name, value):
    # Twins share all, cousins all but a few, strangers nothing; an odd one out.
    rng = np.random.default_rng(2)
    keep = np.zeros((23, 90), bool)
    keep[:8] = rng.random(90) < 0.6
    for row in range(8, 16):
        keep[row, rng.choice(60, 25, replace=False)] = True
    keep[16:22:2, :45] = keep[17:22:2, 45:] = True
    keep[22, 3] = True
    weight = rng.standard_normal(keep.shape, dtype=np.float32) * keep
    blob = P.pack(weight, tile=32, chunk=90, row_block=23, value=value)
    P.validate(blob)
    stored = P.unpack(blob)
    assert np.array_equal(stored != 0, keep)
    assert np.array_equal(reference.unpack(blob), stored)
    for tokens in (1, 20, 70):
        x = rng.standard_normal((tokens, 90), dtype=np.float32)
        assert close(P.linear(blob, x, isa=name), dense(stored, x), stored, x)
        x[0, 50] = np.inf
        with np.errstate(invalid="ignore"):
            expected = dense(stored, x)
        assert np.array_equal(np.isnan(P.linear(blob, x, isa=name)), np.isnan(expected))


def test_a_tiled_weight_of_another_layout_is_refused():
    blob = P.pack(sparse(20, 30, 0.5))
    blob[52] = 0  # p[3] of the header
    for read in (describe, P.validate, P.unpack, reference.unpack):
        with pytest.raises(ValueError, match="written by another version of secateur; pack the weight again"):
            read(blob)
    with pytest.raises(ValueError, match="written by another version"):
        P.linear(blob, np.zeros((1, 30), np.float32))


def test_bfloat16_rounds_to_nearest_even():
    weight = np.array([[1.0, 1.00390625, 1.01171875, -3.1415927]], np.float32)
    expected = [[1.0, 1.0, 1.015625, -3.140625]]
    blob = P.pack(weight, value="bfloat16")
    assert P.unpack(blob).tolist() == expected
    assert reference.unpack(blob).tolist() == expected


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_activations(name, activation, tokens):
    weight = np.eye(50, dtype=np.float32)
    x = np.linspace(-12, 12, tokens * 50, dtype=np.float32).reshape(tokens, 50)
    x[0, :2] = [-200.0, 200.0]
    expected = reference._ACTIVATE[activation](x.astype(np.float64))
    y = P.linear(P.pack(weight), x, activation=activation, isa=name)
    assert np.allclose(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 37])
def test_not_finite_inputs_spread_as_in_a_dense_product(name, bad, tokens):
    weight = sparse(40, 60, 0.3, seed=3)
    weight[7] = 0
    weight[:, 11] = np.abs(weight[:, 11]) + 1  # nonzero everywhere: infinity stays infinity
    x = np.random.default_rng(0).standard_normal((tokens, 60), dtype=np.float32)
    x[tokens // 2, 11] = bad
    x[tokens - 1, 12] = bad
    with np.errstate(invalid="ignore"):
        expected = dense(weight, x)
    y = P.linear(P.pack(weight), x, isa=name)
    assert np.array_equal(np.isnan(y), np.isnan(expected))
    assert np.allclose(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_nan_passes_through_activations(name, activation):
    x = np.full((2, 5), np.nan, np.float32)
    assert np.isnan(P.linear(P.pack(np.eye(5, dtype=np.float32)), x, activation=activation, isa=name)).all()


@pytest.mark.parametrize("name", ISAS)
def test_unaligned_strided_and_transposed_inputs(name):
    weight = sparse(33, 41, 0.4)
    blob = P.pack(weight)
    raw = np.random.default_rng(0).standard_normal(20 * 45 + 1, dtype=np.float32)
    wide = raw[1:].reshape(20, 45)
    for x in (wide[:, 3:44], wide[::2, :41], np.asfortranarray(wide[:, :41]), wide[::-1, :41]):
        assert close(P.linear(blob, x, isa=name), dense(weight, x), weight, x)


def test_no_tokens():
    assert P.linear(P.pack(sparse(4, 5, 0.5)), np.empty((0, 5), np.float32)).shape == (0, 4)


def test_packing_is_deterministic():
    weight = sparse(100, 100, 0.3)
    assert np.array_equal(P.pack(weight), P.pack(weight.copy()))


def test_errors_say_what_is_wrong():
    weight = sparse(4, 5, 0.5)
    blob = P.pack(weight)
    with pytest.raises(ValueError, match=r"float32 numpy matrix .* not float64 \(4, 5\)"):
        P.pack(weight.astype(np.float64))
    with pytest.raises(ValueError, match="unknown format 'csr'"):
        P.pack(weight, format="csr")
    with pytest.raises(ValueError, match="tile 12 and chunk 128"):
        P.pack(weight, tile=12)
    with pytest.raises(ValueError, match="tile 128 and chunk 200"):
        P.pack(weight, tile=128, chunk=200)
    with pytest.raises(ValueError, match=r"x must be float32 \(tokens, 5\), not float32 \(2, 4\)"):
        P.linear(blob, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"bias must be float32 \(4,\)"):
        P.linear(blob, np.zeros((2, 5), np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="unknown instruction set 'sse'"):
        P.linear(blob, np.zeros((2, 5), np.float32), isa="sse")
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        P.linear(blob, np.zeros((2, 5), np.float32), activation="swish")


def test_isa_that_is_missing_is_an_error():
    missing = "neon" if "avx2" in ISAS else "avx2"
    with pytest.raises(ValueError, match="not available"):
        isa(missing)
    with pytest.raises(ValueError, match="lacks the instruction set"):
        P.linear(P.pack(sparse(4, 5, 0.5)), np.zeros((2, 5), np.float32), isa=missing)


def test_damaged_blobs_are_refused():
    blob = P.pack(sparse(40, 50, 0.5), tile=16, chunk=32)
    with pytest.raises(ValueError, match="damaged"):
        P.validate(blob[:-64])
    with pytest.raises(ValueError, match="damaged"):
        describe(np.zeros(256, np.uint8))
    refused = 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        hurt = blob.copy()
        hurt[rng.integers(8, hurt.size)] ^= rng.integers(1, 256, dtype=np.uint8)
        try:
            P.validate(hurt)
        except ValueError:
            refused += 1
            continue
        # What passes may hold other numbers, but must not lead outside: run it (under ASan in the native
        # tests).
        P.linear(hurt, np.ones((5, 50), np.float32))
    assert refused > 50
