"""Differences are told in units of the output, however small or large it is."""

import contextlib

import numpy as np
import pytest

from secateur.check import VerifyError, difference, verify
from secateur.plan import Plan


class Answers:
    """A host whose copy answers with a multiple of what it answers itself."""

    def __init__(self, output, times):
        self.output, self.times = output, times

    def outputs(self, batch):
        return [self.output]

    def masked(self, plan):
        return contextlib.nullcontext()

    def copy(self):
        return Answers(self.output * self.times, 1.0)

    def resize(self, plan):
        pass


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
def test_a_wrong_shrink_is_refused_at_any_scale_of_the_outputs(scale):
    output = np.array([[1.0, -2.0], [0.5, 0.0]]) * scale
    with pytest.raises(VerifyError, match=r"differ by 4\.00e\+00"):
        verify(Answers(output, -3.0), Plan(), [None])
    assert verify(Answers(output, 1 + 1e-6), Plan(), [None]).difference == pytest.approx(1e-6, rel=1e-3)


def test_difference_of_each_output_is_relative_to_its_largest_value():
    big, small = np.array([100.0, 50.0]), np.array([1e-3, 0.0])
    assert difference([big, small], [big + 1, small]) == pytest.approx(0.01)
    assert difference([big, small], [big, small + 1e-4]) == pytest.approx(0.1)
    assert difference([np.zeros(3)], [np.zeros(3)]) == 0.0
    assert difference([np.zeros(3)], [np.array([0.0, 1e-12, 0.0])]) == float("inf")
    assert difference([np.array([np.inf, 2.0])], [np.array([np.inf, 1.0])]) == 0.5
    assert difference([big], [big[:1]]) == difference([big], []) == float("inf")
