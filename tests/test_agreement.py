"""Outputs agree element by element, in units that no single value sets."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.agreement import FILL, AgreementError, compare, leaves, scale_of

INF, NAN = float("inf"), float("nan")
TOLERANCE = 1e-5
SIZES = st.integers(1, 400)
SEEDS = st.integers(0, 2**31)
BAD = st.sampled_from([INF, -INF, NAN])


def drawn(seed, size, scale=1.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


@dataclass
class Answer:
    logits: Any
    extra: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


class Plain:
    def __init__(self, logits):
        self.logits, self._private = logits, np.ones(3)


class SomeCache:
    def __init__(self):
        self.keys = np.ones(3)


# -- which values are found ------------------------------------------------------------------------------------


def test_every_structure_is_walked():
    one = np.ones(2)
    nested = {"a": [one, (one, Answer(one, None))], "b": Pair(one, {"c": Plain(one)}), "past_key_values": one}
    names = [name for name, _ in leaves({**nested, "d": SomeCache(), "e": None, "f": "text", "g": 3})]
    assert names == ["a.0", "a.1.0", "a.1.1.logits", "b.first", "b.second.c.logits", "g"]
    assert [name for name, _ in leaves(one)] == ["output"]
    assert [name for name, _ in leaves((one, one))] == ["output 0", "output 1"]
    endless = []
    endless.append(endless)
    with pytest.raises(AgreementError, match="nested in more than"):
        list(leaves(endless))


@pytest.mark.parametrize("wrap", [Answer, Plain, lambda x: Pair(x, x), lambda x: {"a": {"b": (x,)}}, lambda x: [[x]]])
def test_a_difference_is_found_in_every_structure(wrap):
    right, wrong = np.array([1.0, 2.0]), np.array([1.0, 2.5])
    assert compare(wrap(right), wrap(right)).error == 0.0
    assert compare(wrap(right), wrap(wrong)).error == 0.25


def test_what_cannot_be_compared_is_an_error():
    one = np.ones(3)
    with pytest.raises(AgreementError, match=r"b is an output of one model only \(2 outputs against 1\)"):
        compare({"a": one, "b": one}, {"a": one})
    with pytest.raises(AgreementError, match="output 1 is an output of one model only"):
        compare([one], [one, one])
    with pytest.raises(AgreementError, match=r"logits has shape \(3,\) in one model and \(2,\) in the other"):
        compare(Answer(one), Answer(one[:2]))
    for nothing in ({}, None, [np.zeros(0)], "text", np.full(3, NAN), SomeCache()):
        with pytest.raises(AgreementError, match="no numbers that could be compared"):
            compare(nothing, nothing)
    with pytest.raises(AgreementError, match="text holds object, which are no numbers"):
        compare({"text": np.array(["a", None])}, {"text": np.array(["a", None])})


# -- units -----------------------------------------------------------------------------------------------------


def test_scale_of_by_hand():
    assert scale_of(np.array([3.0, -1.0, 2.0])) == 3.0
    assert scale_of(np.arange(1.0, 101.0)) == 90.0
    assert scale_of(np.array([0.0] * 99 + [2.0])) == 2.0
    assert scale_of(np.array([0.0, NAN, INF])) == 0.0
    for fill in (-1e4, -65504.0, -1e9, float(np.finfo(np.float32).min)):
        assert scale_of(np.array([1.0] + 999 * [fill])) == 1.0
        assert scale_of(np.array([0.0, fill])) == 0.0
    assert scale_of(np.array([2e6, 1e6, 3e6])) == 3e6  # large values are no fills without small ones beside them
    assert scale_of(np.array([5000.0] + 99 * [1.0])) == 5.0


def test_the_worst_place_is_named():
    a = np.arange(12.0).reshape(3, 4)
    b = a.copy()
    b[1, 2] += 1
    b[2, 3] -= 0.5
    found = compare({"x": a, "y": a}, {"x": a, "y": b})
    assert (found.where, found.error, found.gap, found.values) == ("y[1, 2]", 0.1, 1.0, 24)
    assert compare(a, a).where == ""
    assert compare(np.float32(2), np.float32(1)).where == "output"


def test_a_large_logit_hides_nothing():
    logits = np.array([[0.5, -1.0, -1e9], [0.25, 2.0, -1e9]], np.float32)
    wrong = logits.copy()
    wrong[0, 0] += 3
    assert compare(logits, wrong).error == pytest.approx(1.5)
    wrong[0, 0], wrong[1, 2] = logits[0, 0], -0.9e9
    assert compare(logits, wrong).error == pytest.approx(0.1)


def test_integers_booleans_and_complex_numbers():
    ids, mask = np.array([2**53, 5]), np.array([True, False])
    assert compare([ids, mask], [ids.astype(np.int64), mask]).error == 0.0
    assert compare(ids, ids + np.array([1, 0])).error == INF
    assert compare(mask, ~mask).where == "output[0]"
    z = np.array([1 + 2j, 3 - 4j])
    for part in (1, 1j):
        assert compare(z, z + part * np.array([0, 0.4])).error == pytest.approx(0.1)
    assert compare(z, z + np.array([0, 1e-3j])).where == "output[1]"
    assert compare(z, z.real).error == 1.0


@given(SEEDS, SIZES, st.floats(-30, 30), st.floats(0, 1))
def test_scaling_both_changes_nothing(seed, size, power, noise):
    a = np.clip(drawn(seed, size).astype(np.float64), -9, 9)
    b = a + noise * drawn(seed + 1, size)
    factor = 2.0 ** int(power) if abs(power) > 12 else 10.0**power
    expected = compare(a, b)
    found = compare(a * factor, b * factor)
    assert found.error == pytest.approx(expected.error, rel=1e-9)


@given(SEEDS, SIZES, BAD, st.data())
def test_nan_and_infinity_are_told_by_place_and_sign_on_either_side(seed, size, bad, data):
    a = drawn(seed, size + 1)
    place = data.draw(st.integers(0, size))
    other = data.draw(st.integers(0, size))
    b = a.copy()
    b[place] = bad
    assert compare(a, b).error == compare(b, a).error == INF
    assert compare(b, b).error == 0.0
    if other != place:
        a[other] = bad
        assert compare(a, b).error == compare(b, a).error == INF
    if np.isinf(bad):
        assert compare(b, np.where(np.isinf(b), -b, b)).error == INF


@settings(max_examples=200)
@given(SEEDS, SIZES, st.sampled_from([None, -1e4, -1e9, -3.4e38, 1e12, -INF]), st.floats(0, 1), st.data())
def test_any_single_change_is_refused_wherever_it_stands(seed, size, fill, share, data):
    a = drawn(seed, size)
    if fill is not None:
        a = np.where(np.random.default_rng(seed + 1).random(size) < share, np.float32(fill), a)
    place = data.draw(st.integers(0, size - 1))
    a[place] = own = drawn(seed + 2, 1)[0] or 1.0  # whatever stands beside it
    ordinary = np.abs(a[np.abs(a) < FILL])
    b = a.astype(np.float64)
    b[place] += 1.5 * TOLERANCE * max(float(ordinary.max()), abs(float(own)))
    assert compare(a, b).error > TOLERANCE


@pytest.mark.parametrize("huge", [None, 1e9, -3e38, INF])
@pytest.mark.parametrize("place", [0, 777_777, 999_999])
def test_a_single_change_among_a_million(place, huge):
    a = drawn(0, 1_000_000)
    if huge is not None:
        a[500_000] = huge
    b = a.copy()
    b[place] += 1e-3
    found = compare(a, b)
    assert found.index == (place,)
    assert 1e-4 < found.error < 1e-3
