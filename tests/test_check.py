"""Differences are told in units of the output, however small or large it is."""

import contextlib

import numpy as np
import pytest

from secateur.check import VerifyError, check_reloaded, difference, verify
from secateur.errors import ModelError
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


class Rounded(Answers):
    """A host that says in float64 what `exact` says."""

    def __init__(self, output, times, exact):
        super().__init__(output, times)
        self.exact = exact

    def in_double(self):
        return self.exact


def test_rounding_is_what_float64_knows_nothing_of():
    output = np.array([[1.0, -2.0], [0.5, 0.0]])
    same, apart = Answers(output, 1.0), Answers(output, 1 + 1e-9)
    assert verify(Rounded(output, 1 + 3e-5, same), Plan(), [None]).difference == pytest.approx(3e-5, rel=1e-3)
    for times, exact in ((1 + 3e-5, apart), (1 + 3e-5, None), (1 + 2e-3, same), (-1.0, same)):
        with pytest.raises(VerifyError, match=r"permitted: 1e-05"):
            verify(Rounded(output, times, exact), Plan(), [None])


def test_difference_of_each_output_is_relative_to_its_largest_value():
    big, small = np.array([100.0, 50.0]), np.array([1e-3, 0.0])
    assert difference([big, small], [big + 1, small]) == pytest.approx(0.01)
    assert difference([big, small], [big, small + 1e-4]) == pytest.approx(0.1)
    assert difference([np.zeros(3)], [np.zeros(3)]) == 0.0
    assert difference([np.zeros(3)], [np.array([0.0, 1e-12, 0.0])]) == float("inf")
    assert difference([np.array([np.inf, 2.0])], [np.array([np.inf, 1.0])]) == 0.5
    assert difference([big], [big[:1]]) == difference([big], []) == float("inf")


def test_a_reloaded_model_gives_the_same_numbers():
    output, nan = np.array([1.0, 2.0]), np.array([1.0, np.nan])
    assert check_reloaded([output], [output.copy()]) == 0.0
    with pytest.raises(ModelError, match=r"differs from the saved one by 5\.00e-01; nothing was saved"):
        check_reloaded([output], [np.array([1.0, 3.0])])
    for expected in ([nan], [output, nan], []):
        with pytest.raises(ModelError, match="gives NaN, or nothing"):
            check_reloaded(expected, expected)
    with pytest.raises(ModelError, match="differs from the saved one by inf"):
        check_reloaded([output], [nan])


class Other(Answers):
    """A host whose copy answers with outputs of its own."""

    def __init__(self, outputs, others):
        self.named, self.others = outputs, others

    def outputs(self, batch):
        return list(self.named.values())

    def named_outputs(self, batch):
        return self.named

    def copy(self):
        return Other(self.others, None)


LOGITS = np.array([[1.0, -2.0], [0.5, 0.25]])


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        (LOGITS, LOGITS[:1], r"logits has shape \(2, 2\) in one model and \(1, 2\)"),
        (np.array([[1.0, -1e9]]), np.array([[80000.0, -1e9]]), r"differ by 8\.00e\+04 at logits\[0, 0\]"),
        (np.array([4, 5]), np.array([4, 6]), r"differ by inf at logits\[1\]"),
        (LOGITS + 1j, LOGITS + 2j, r"differ by 5\.00e-01 at logits\[0, 0\]"),
        (np.array([np.inf, 1.0]), np.array([-np.inf, 1.0]), r"differ by inf at logits\[0\]"),
        (np.array([np.inf, 1.0]), np.array([3.0, 1.0]), "differ by inf"),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), "the masked model gives NaN"),
        (LOGITS, LOGITS * np.nan, "the shrunk model gives NaN"),
        (np.zeros(0), np.zeros(0), "no numbers that could be compared"),
    ],
)
def test_what_verify_refuses(right, wrong, says):
    with pytest.raises(VerifyError, match=says):
        verify(Other({"logits": right}, {"logits": wrong}), Plan(), [None])


def test_verify_refuses_other_outputs():
    with pytest.raises(VerifyError, match=r"extra is an output of one model only \(1 outputs against 2\)"):
        verify(Other({"logits": LOGITS}, {"logits": LOGITS, "extra": LOGITS}), Plan(), [None])
    with pytest.raises(VerifyError, match="no numbers that could be compared"):
        verify(Other({}, {}), Plan(), [None])
