"""Numbers as readers see them."""

import pytest

from secateur.report import figures
from secateur.schemas.record import Speed


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.number(0.86125), "0.8612"),
        (figures.number(1234), "1,234"),
        (figures.number(3.2e-6), "3.2e-06"),
        (figures.number(-2.5), "−2.5"),
        (figures.number(123456.7), "123,457"),
        (figures.signed(-0.0013), "−0.0013"),
        (figures.signed(12.34), "+12.3"),
        (figures.score(0.86), "0.8600"),
        (figures.score(1234.5), "1,234.50"),
        (figures.share(0.58), "58%"),
        (figures.share(0.0042), "0.42%"),
        (figures.share(0.0), "0%"),
        (figures.size(22_700_000), "22.7 M"),
        (figures.size(1_310_000_000, "B"), "1.31 GB"),
        (figures.size(8_030_000_000), "8.03 B"),
        (figures.size(12), "12"),
        (figures.milliseconds(24.67), "24.7 ms"),
        (figures.milliseconds(1234.4), "1,234 ms"),
        (figures.seconds(497), "8 min 17 s"),
        (figures.seconds(11_100), "3 h 5 min"),
        (figures.date("2026-11-30T12:00:00+00:00"), "2026-11-30 12:00 UTC"),
        (figures.date("2026-11-30"), "2026-11-30"),
        (figures.date("yesterday"), "yesterday"),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected


def test_settings():
    speed = Speed(runtime="llama.cpp", what="token", batch=1, length=512, threads=4, ms=8.0, dense_ms=12.0)
    assert figures.setting(speed) == "llama.cpp, token, 1 × 512 tokens"
    assert figures.threads(speed) == "4 threads"
    assert figures.times(speed) == 1.5
    assert figures.setting(speed.model_copy(update={"length": 0, "what": "forward"})) == "llama.cpp, batch of 1"
