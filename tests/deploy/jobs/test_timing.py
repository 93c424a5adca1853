"""Ctrl-C during bench: the rows that were complete are shown."""

import json

import pytest

from secateur.cli import bench
from secateur.deploy import runner
from secateur.deploy.jobs.results import Bench
from secateur.deploy.jobs.timing import in_turn
from secateur.errors import Interrupted

ROW = {"median_ms": 2.5, "low_ms": 2.0, "high_ms": 3.0, "startup_s": 0.1, "peak_bytes": 10**6}


def measure(monkeypatch, tmp_path, shapes):
    """Time one artefact at three shapes; Ctrl-C comes at the shape after those of `shapes`."""

    def timed(artefacts, batch, length, *args, **kwargs):
        if batch not in shapes:
            raise KeyboardInterrupt
        return {name: dict(ROW) for name in artefacts}

    def make(name, runtime, folder, shape):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / runner.MANIFEST).write_text("{}")
        return tmp_path / "made"

    monkeypatch.setattr(runner, "measure", timed)
    tokens = {"graphs": {"model": {"inputs": [{"fill": "ids", "shape": ["batch", "length"]}]}}}
    monkeypatch.setattr(runner, "read", lambda folder: tokens)

    def result(timings):
        return Bench(timings, [], 1, {})

    return in_turn(["a"], ["torch"], [1, 2, 4], [8], make, lambda runtime: False, threads=1, turns=1, result=result)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupted_bench_shows_the_rows_that_are_complete(monkeypatch, tmp_path, capsys, as_json):
    with pytest.raises(Interrupted, match="the 2 rows that were complete are shown, the others were not timed"):
        bench.time_and_show(lambda: measure(monkeypatch, tmp_path, (1, 2)), None, json=as_json)
    out = capsys.readouterr().out
    if as_json:
        assert [row["batch"] for row in json.loads(out)["rows"]] == [1, 2]
    else:
        assert "2 x 8" in out
        assert "4 x 8" not in out


def test_an_interrupt_before_the_first_row_is_a_plain_one(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        measure(monkeypatch, tmp_path, ())
    assert type(caught.value) is KeyboardInterrupt


def test_without_an_interrupt_every_row_is_there(monkeypatch, tmp_path):
    assert [t.batch for t in measure(monkeypatch, tmp_path, (1, 2, 4)).timings] == [1, 2, 4]
