"""What validation refuses beyond wild indices: blobs that mean one thing to the kernels and another unpacked."""

import numpy as np
import pytest

from secateur.kernels import packing as P
from secateur.kernels import reference
from secateur.kernels.format import describe
from secateur.kernels.native import load_native
from tests.kernels.weights import blocked, in_groups, in_quads, sparse

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


def sections(blob):
    return np.frombuffer(blob[56:112].tobytes(), "<u8").astype(int).tolist()


def tiled(value="float32"):
    """The second weight of a group of four takes the column of the first."""
    blob = P.pack(sparse(1, 40, 0.5), value=value, tile=16, chunk=40, row_block=8)
    group = 24 if value == "float32" else 16
    at = sections(blob)[3] + group + group - 8  # a whole group: an incomplete one comes first
    blob[at + 2 : at + 4] = blob[at : at + 2]
    return blob


def block(value="float32"):
    blob = P.pack(blocked(8, 40, 0.9, 4), format="block", block=4, value=value)
    at = sections(blob)[1]
    blob[at + 2 : at + 4] = blob[at : at + 2]
    return blob


def quad():
    blob = P.pack(in_quads(8, 40, 1.0), format="quad", value="int8", tile=16, chunk=40)
    at = sections(blob)[3] + 24 + 16
    blob[at + 2 : at + 4] = blob[at : at + 2]
    return blob


def nm(value="float32"):
    blob = P.pack(in_groups(16, 40, 2, 4), format="nm", value=value)
    at = sections(blob)[0]
    word = int.from_bytes(blob[at : at + 4].tobytes(), "little")
    word = word & ~0b1100 | (word & 0b11) << 2
    blob[at : at + 4] = np.frombuffer(word.to_bytes(4, "little"), np.uint8)
    return blob


def quad_sums():
    """The kernels correct by the sum of a row what they rounded."""
    blob = P.pack(in_quads(8, 40, 0.5), format="quad", value="int8")
    blob[sections(blob)[5]] ^= 1
    return blob


def nm_past_the_end():
    blob = P.pack(in_groups(16, 5, 1, 4), format="nm", keep=1)
    at = sections(blob)[0]
    blob[at : at + 64].view("<u4")[0] |= 0b1100  # the second group's weight stands in column 7
    blob[at + 64 + 64 : at + 64 + 68] = np.frombuffer(np.float32(1).tobytes(), np.uint8)
    return blob


@pytest.mark.parametrize(
    "make",
    [
        tiled,
        lambda: tiled("bfloat16"),
        block,
        lambda: block("int8"),
        quad,
        nm,
        lambda: nm("int8"),
        quad_sums,
        nm_past_the_end,
    ],
    ids=["tiled", "tiled bf16", "block", "block int8", "quad", "nm", "nm int8", "sums of quads", "past the end of nm"],
)
def test_a_blob_that_means_two_things_is_refused(make):
    hurt = make()
    for refuses in (P.validate, P.unpack, reference.unpack):
        with pytest.raises(ValueError, match="damaged; pack the weight again"):
            refuses(hurt)


@pytest.mark.parametrize("chunk", [1, 5, 40, 96])
def test_columns_that_chunks_share_are_no_repetition(chunk):
    """A row may leave weights to the next chunk, and zeros fill rows up, in the same columns of two chunks as well."""
    for density in (0.05, 0.3, 0.7, 1.0):
        weight = sparse(70, 300, density, seed=chunk)
        blob = P.pack(weight, tile=16, chunk=chunk, row_block=32)
        P.validate(blob)
        assert np.array_equal(P.unpack(blob), weight)
        assert np.array_equal(reference.unpack(blob), weight)


def test_unpack_validates_first():
    blob = P.pack(sparse(40, 50, 0.5), tile=16, chunk=32)
    blob[sections(blob)[3] :] = 255
    with pytest.raises(ValueError, match="damaged"):
        P.unpack(blob)
    with pytest.raises(ValueError, match="damaged"):
        reference.unpack(blob)


def test_headers_that_lie():
    blob = P.pack(sparse(40, 50, 0.5))
    for at, number, kind in ((24, 2001, "<u8"), (24, 2**63, "<u8"), (40, 0, "<u4"), (44, 0, "<u4"), (48, 0, "<u4")):
        hurt = blob.copy()
        raw = np.array([number], kind).tobytes()
        hurt[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        for refuses in (P.validate, P.unpack, reference.unpack):
            with pytest.raises(ValueError, match="damaged"):
                refuses(hurt)
    for view in (blob[::-1], np.repeat(blob, 2)[::2]):
        with pytest.raises(ValueError, match=r"contiguous|damaged"):
            P.validate(view)
    assert describe(blob).rows == 40
