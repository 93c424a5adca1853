import pytest

from secateur import schedule


def test_cubic_meets_its_ends_and_never_falls():
    s = schedule.cubic(0.8, steps=100, begin=10)
    values = [s(i) for i in range(150)]
    assert values[:11] == [0.0] * 11
    assert values[110:] == [0.8] * 40
    assert values == sorted(values)
    assert s(60) == pytest.approx(0.8 * (1 - 0.5**3))


def test_linear_and_constant():
    assert schedule.linear(0.6, steps=10, start=0.2)(5) == pytest.approx(0.4)
    assert schedule.constant(0.3)(10**9) == 0.3
    assert schedule.linear(0.6, steps=0, begin=3)(2) == 0.0
    assert schedule.linear(0.6, steps=0, begin=3)(3) == 0.6
