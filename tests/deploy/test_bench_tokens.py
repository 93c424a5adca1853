"""bench of folders with a schedule of tokens: the rows without it, and the sentence where it brings nothing."""

import json

from secateur.deploy.jobs.bench import slower_with_schedule, with_all_tokens
from secateur.deploy.jobs.results import Timing


def test_a_folder_with_a_schedule_is_timed_without_it_first(tmp_path):
    for name, described in (("plain", {}), ("short", {"quantization_config": {"tokens": {}}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    named, whole = with_all_tokens({name: tmp_path / name for name in ("plain", "short")})
    assert list(named) == ["plain", "short, all tokens", "short"]
    assert named["short, all tokens"] == tmp_path / "short"
    assert whole == {"short": "short, all tokens"}


def test_a_schedule_that_brings_nothing_is_said():
    rows = [
        Timing("short, all tokens", "onnx", 1, 16, median_ms=10.0),
        Timing("short", "onnx", 1, 16, median_ms=11.0),
        Timing("short, all tokens", "onnx", 1, 256, median_ms=100.0),
        Timing("short", "onnx", 1, 256, median_ms=60.0),
    ]
    (sentence,) = slower_with_schedule(rows, {"short": "short, all tokens"})
    assert "brings nothing on onnx at 1 x 16: short takes 1.10 of the time of all tokens" in sentence
