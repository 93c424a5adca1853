import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.errors import ModelError
from secateur.torch.files.zero_packing import BITS, VALUES, pack, pack_state, pays, unpack, unpack_state

WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(WORDS[a.dtype]), b.view(WORDS[b.dtype]))


@pytest.mark.parametrize("dtype", WORDS)
def test_round_trip_keeps_every_bit(dtype):
    tensor = torch.tensor([[0.0, -0.0, float("nan")], [1.5, float("inf"), 0.0], [0.0, -2.0, 1e-7]], dtype=dtype)
    bits, values = pack(tensor)
    assert bits.tolist() == [0b01111001, 0b10000000]
    assert values.shape == (6,)
    assert same_bits(unpack(bits, values, (3, 3)), tensor)


@settings(max_examples=60, deadline=None)
@example(shape=[], dtype=torch.float16, seed=5, sparsity=0.0)  # one signalling NaN
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    dtype=st.sampled_from(list(WORDS)),
    seed=st.integers(0, 9),
    sparsity=st.floats(0, 1),
)
def test_round_trip_of_random_patterns(shape, dtype, seed, sparsity):
    generator = torch.Generator().manual_seed(seed)
    bound = 2**31 - 1 if dtype == torch.float32 else 2**15 - 1
    words = torch.randint(-bound, bound, shape, generator=generator, dtype=torch.int64).to(WORDS[dtype])
    words[torch.rand(shape, generator=generator) < sparsity] = 0
    tensor = words.view(dtype)
    assert same_bits(unpack(*pack(tensor), tuple(shape)), tensor)


def test_a_transposed_tensor_packs_in_its_own_order():
    tensor = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 4.0]]).t()
    assert pack(tensor)[1].tolist() == [2.0, 3.0, 1.0, 4.0]
    assert torch.equal(unpack(*pack(tensor), (2, 3)), tensor)


def test_only_what_gets_smaller_is_packed():
    dense, sparse = torch.ones(64, 64), torch.ones(64, 64)
    sparse[:48] = 0
    small = torch.zeros(8)
    assert (pays(dense), pays(sparse), pays(small), pays(torch.zeros(5000, dtype=torch.int64))) == (0, 1, 0, 0)
    state = pack_state({"a": dense, "b": sparse, "c": small})
    assert set(state) == {"a", "b" + BITS, "b" + VALUES, "c"}
    stored = sum(state[n].nbytes for n in ("b" + BITS, "b" + VALUES))
    assert stored == 64 * 64 // 8 + 16 * 64 * 4
    back = unpack_state(state, {"a": (64, 64), "b": (64, 64), "c": (8,)})
    assert torch.equal(back["b"], sparse)
    assert set(back) == {"a", "b", "c"}


def test_what_does_not_belong_together_is_refused():
    bits, values = pack(torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ModelError, match="cannot be"):
        unpack(bits, values, (20,))
    with pytest.raises(ModelError, match="mark 2 weights of .* 1 values"):
        unpack(bits, values[:1], (3,))
    with pytest.raises(ModelError, match="belongs to no weight"):
        unpack_state({"x" + BITS: bits, "x" + VALUES: values}, {})
    with pytest.raises(ModelError, match="int64 cannot be packed"):
        pack(torch.zeros(3, dtype=torch.int64))
