import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from secateur.errors import DataError
from secateur.stats import Stats, Tally


def one(seed):
    rng = np.random.default_rng(seed)
    tally = Tally()
    for key in ("a", "b")[: 1 + seed % 2]:
        tally.add("grad", key, rng.integers(0, 9, size=3).astype(float), 1 + seed % 3)
    return tally.stats()


def same(a, b):
    assert a.counts == b.counts
    for quantity in a.sums:
        for key in a.sums[quantity]:
            np.testing.assert_array_equal(a.sums[quantity][key], b.sums[quantity][key])


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_stats_are_a_commutative_monoid(x, y, z):
    a, b, c = one(x), one(y), one(z)
    same(a.merge(b), b.merge(a))
    same(a.merge(b).merge(c), a.merge(b.merge(c)))
    same(a.merge(Stats()), a)


def test_merging_leaves_its_arguments_alone():
    a = one(1)
    before = a.sums["grad"]["a"].copy()
    a.merge(a)
    np.testing.assert_array_equal(a.sums["grad"]["a"], before)


def test_mean_and_what_was_never_seen():
    tally = Tally()
    tally.add("act_sq", "w", np.array([2.0, 4.0]), 2)
    tally.add("act_sq", "w", np.array([1.0, 0.0]), 1)
    assert tally.stats().mean("act_sq", "w").tolist() == [1.0, 4 / 3]
    with pytest.raises(DataError, match="no act_sq was collected for v"):
        tally.stats().mean("act_sq", "v")


def test_sums_counts_and_notes_come_back_from_a_file(tmp_path):
    stats = one(1)
    stats.save(tmp_path / "s.safetensors", {"of": "this"})
    back, notes = Stats.load(tmp_path / "s.safetensors")
    same(stats, back)
    assert notes == {"of": "this"}
    one(2).save(tmp_path / "s.safetensors")
    same(Stats.load(tmp_path / "s.safetensors")[0], one(2))


def test_a_damaged_file_of_sums_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"no tensors at all")
    with pytest.raises(DataError, match="is damaged"):
        Stats.load(path)
    save_file({"grad/a": np.ones(2)}, path)
    with pytest.raises(DataError, match="is damaged"):
        Stats.load(path)
