"""What every Host has to pass: subclass `Conformance`, and say how to make the host, its batches and more padding.

class TestMine(Conformance):
    def make(self): ...            # a small host, always the same
    def batches(self): ...         # at least two batches with labels, the last one smaller
"""

import numpy as np
import pytest

from secateur.agreement import compare
from secateur.arrays import to_numpy
from secateur.check import VerifyError, verify
from secateur.host import Host
from secateur.plan import Plan

KINDS = ("head", "kv", "ffn")


class Conformance:
    """One class a host; every test makes its own host."""

    needs = ("grad", "grad_sq", "act_sq", "unit_act", "unit_grad_sq", "attn_mass", "attn_output", "attn_sum")
    """Quantities that the host can collect."""

    def make(self):
        raise NotImplementedError

    def batches(self):
        raise NotImplementedError

    def padded(self, batch):
        """The same batch with more padding, or None where there is none."""
        return None

    def train(self, host, batches):
        """A few optimizer steps with weight decay on the labels."""
        raise NotImplementedError

    def load(self, folder, host):
        """A host of the saved folder."""
        raise NotImplementedError

    def shapes(self, host):
        """Shape of every parameter, from the framework."""
        raise NotImplementedError

    def slow(self, host, batches):
        """Means of some quantities computed the slow way: quantity -> key -> array."""
        return {}

    @pytest.fixture
    def host(self):
        return self.make()

    @pytest.fixture
    def units(self, host):
        """A plan that keeps about half of every prunable axis of the usual kinds, other units in each."""
        rng = np.random.default_rng(0)
        parts = {part for axis in host.layout.axes.values() for part in axis.parts}
        keep = {}
        for axis in host.layout.axes.values():
            if axis.kind in KINDS and not axis.frozen and not axis.parts and axis.size > 1:
                keep[axis.name] = np.sort(rng.choice(axis.size, axis.size // 2, replace=False))
        assert keep, parts
        return Plan(keep=keep).check(host.layout)

    @pytest.fixture
    def elements(self, host):
        """A plan that masks two in three of the weights of some linear layers."""
        rng = np.random.default_rng(1)
        names = list(host.layout.linears)[:3]
        return Plan(masks={name: rng.random(host.layout.shape(name)) > 2 / 3 for name in names}).check(host.layout)

    def state(self, host):
        return {name: to_numpy(host.read(name)).copy() for name in host.layout.params}

    def same(self, a, b, tolerance=0.0):
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)

    # -- reading and running ----------------------------------------------------------------------------------------

    def test_is_a_host(self, host):
        assert isinstance(host, Host)
        first = next(iter(host.layout.axes.values()))
        start = f"{type(host).__name__}({type(host.model).__name__}: "
        assert repr(host).startswith(start)
        assert f" {first.kind} " in repr(host)
        assert "\n" not in repr(host)

    def test_the_layout_has_the_shapes_of_the_model(self, host):
        shapes = self.shapes(host)
        host.layout.check(shapes)
        assert set(host.layout.params) & set(shapes)
        for name in host.layout.params:
            assert tuple(host.read(name).shape) == host.layout.shape(name)

    def test_what_is_written_is_read(self, host):
        for name in host.layout.linears:
            value = np.random.default_rng(0).normal(size=host.layout.shape(name)).astype(np.float32)
            host.write(name, value)
            np.testing.assert_array_equal(to_numpy(host.read(name)), value)
        with pytest.raises(ValueError, match="has shape"):
            host.write(name, np.zeros(3))
        with pytest.raises(ValueError, match="no parameter"):
            host.read("nowhere.weight")

    def test_outputs_repeat(self, host):
        batch = self.batches()[0]
        self.same(host.outputs(batch), host.outputs(batch))

    def test_a_copy_is_independent(self, host):
        batch, other = self.batches()[0], host.copy()
        before = host.outputs(batch)
        self.same(other.outputs(batch), before)
        name = next(iter(host.layout.linears))
        other.write(name, np.zeros(host.layout.shape(name)))
        self.same(host.outputs(batch), before)

    # -- collecting -------------------------------------------------------------------------------------------------

    def test_statistics_equal_slow_ones(self, host):
        batches = self.batches()
        wanted = self.slow(host, batches)
        stats = host.collect(list(wanted), batches)
        for quantity, entries in wanted.items():
            for key, value in entries.items():
                np.testing.assert_allclose(
                    to_numpy(stats.mean(quantity, key)), value, rtol=2e-4, atol=1e-7, err_msg=f"{quantity} {key}"
                )

    def test_halves_merge_to_the_whole(self, host):
        batches = self.batches()
        whole = host.collect(self.needs, batches)
        merged = host.collect(self.needs, batches[:1]).merge(host.collect(self.needs, batches[1:]))
        assert set(whole.sums) == set(self.needs)
        assert whole.counts == merged.counts
        self.close(whole, merged)

    def close(self, a, b):
        for quantity, entries in a.sums.items():
            assert entries.keys() == b.sums[quantity].keys()
            for key, value in entries.items():
                x, y = to_numpy(value), to_numpy(b.sums[quantity][key])
                np.testing.assert_allclose(
                    x, y, rtol=1e-3, atol=2e-5 * max(1e-3, float(np.abs(x).max())), err_msg=f"{quantity} {key}"
                )

    def test_padding_does_not_count(self, host):
        batches = self.batches()
        longer = [self.padded(batch) for batch in batches]
        if longer[0] is None:
            pytest.skip("nothing is padded")
        a, b = host.collect(self.needs, batches), host.collect(self.needs, longer)
        assert a.counts == b.counts
        self.close(a, b)

    def test_collecting_changes_nothing(self, host):
        before, batch = self.state(host), self.batches()[0]
        answer = host.outputs(batch)
        host.collect(self.needs, self.batches())
        for name, value in self.state(host).items():
            np.testing.assert_array_equal(value, before[name])
        self.same(host.outputs(batch), answer)

    def test_no_data_is_an_error(self, host):
        with pytest.raises(ValueError, match="the data is empty"):
            host.collect(["act_sq"], [])

    # -- zeroing and removing ---------------------------------------------------------------------------------------

    def test_masked_is_undone(self, host, units, elements):
        before, batch = self.state(host), self.batches()[0]
        answer = host.outputs(batch)
        for plan in (units, elements):
            with host.masked(plan):
                for name in host.layout.params:
                    mask = plan.mask(host.layout, name)
                    if mask is not None:
                        assert not to_numpy(host.read(name))[~mask].any()
                assert any(np.abs(x - y).max() > 1e-6 for x, y in zip(host.outputs(batch), answer, strict=True))
            with pytest.raises(RuntimeError, match="stop"), host.masked(plan):
                raise RuntimeError("stop")
            for name, value in self.state(host).items():
                np.testing.assert_array_equal(value, before[name])

    def test_removed_equals_masked(self, host, units):
        batches, small = self.batches(), host.copy()
        small.resize(units)
        for batch in batches:
            with host.masked(units):
                assert compare(host.outputs(batch), small.outputs(batch)).error <= 1e-5
        small.layout.check(self.shapes(small))
        assert sum(v.size for v in self.state(small).values()) < sum(v.size for v in self.state(host).values())

    def test_verify_refuses_a_removal_that_errs(self, host, units):
        assert verify(host, units, self.batches()).difference <= 1e-5
        copied = host.copy
        for factor, said in ((1.01, "outputs differ by"), (np.nan, "the shrunk model gives NaN")):

            def erring(factor=factor):
                other = copied()
                resize = other.resize

                def resize_and_err(plan):
                    resize(plan)
                    name = list(host.layout.linears)[-1]
                    other.write(name, to_numpy(other.read(name)) * np.float32(factor))

                other.resize = resize_and_err
                return other

            host.copy = erring
            with pytest.raises(VerifyError, match=said):
                verify(host, units, self.batches())

    def test_zeros_are_held_in_training(self, host, units, elements):
        for plan in (units, elements):
            other = host.copy()
            with other.hold(plan):
                self.train(other, self.batches())
            changed = 0
            for name, before in self.state(host).items():
                mask, after = plan.mask(host.layout, name), to_numpy(other.read(name))
                changed += int((after != before).any())
                if mask is not None:
                    assert not after[~mask].any(), name
            assert changed > len(plan.masks)

    def test_saved_is_loaded(self, host, units, elements, tmp_path):
        for number, plan in enumerate((units, elements)):
            other, batch = host.copy(), self.batches()[0]
            other.resize(plan)
            other.save(tmp_path / str(number), plan)
            self.same(self.load(tmp_path / str(number), other).outputs(batch), other.outputs(batch))
            with pytest.raises(ValueError, match="exists"):
                other.save(tmp_path / str(number), plan)
