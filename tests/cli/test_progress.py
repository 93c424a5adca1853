"""Progress: plain lines in a log, at most one of a bar in ten seconds; nothing with --quiet, and bars on a terminal."""

import io
import json

import pytest

from secateur.cli.progress import EVERY, Progress, minutes
from secateur.training import ranks


class Clock:
    """A clock that goes on by so many seconds each time that it is asked."""

    def __init__(self, step=0.0):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    """A progress whose file is no terminal."""
    return Progress(io.StringIO(), clock)


def lines(progress):
    text = progress.console.file.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    return text.splitlines()


def test_a_bar_in_a_log_says_at_most_one_line_in_ten_seconds(log, clock):
    for _ in log.track(range(100), "evaluate"):
        clock.now += 1
    assert lines(log) == [f"evaluate {n}/100: {minutes(100 - n)} left" for n in range(10, 101, 10)]
    assert EVERY == 10


def test_a_short_bar_says_nothing(log):
    assert list(log.track(iter("abc"), "evaluate")) == ["a", "b", "c"]
    assert lines(log) == []


def test_a_bar_of_unknown_length_counts(log, clock):
    for _ in log.track(iter(range(3)), "read"):
        clock.now += 6
    assert lines(log) == ["read 2"]


def test_stages_are_counted(log):
    log.stages("dense model", "scores", "evaluate", "training", "evaluate")
    for name in ("dense model", "scores", "evaluate", "other", "training", "evaluate"):
        list(log.track(range(3), name))
    assert lines(log) == [
        "stage 1 of 5: dense model",
        "stage 2 of 5: scores",
        "stage 3 of 5: evaluate",
        "stage 4 of 5: training",
        "stage 5 of 5: evaluate",
    ]


def test_a_stage_that_comes_again_keeps_its_number(log):
    log.stages("choice", "measurement")
    for name in ("choice", "choice", "measurement", "choice", "cleaning"):
        log.stage(name)
    assert lines(log) == ["stage 1 of 2: choice", "stage 2 of 2: measurement", "stage 1 of 2: choice", "cleaning"]


def test_the_best_so_far_is_said_now_and_then_and_at_the_end_of_its_stage(log, clock):
    log.stages("search", "healing")
    log.stage("search")
    for number in range(25):
        clock.now += 1
        log.best(f"divergence {number}")
    log.stage("healing")
    assert lines(log) == [
        "stage 1 of 2: search",
        "best so far: divergence 9",
        "best so far: divergence 19",
        "best so far: divergence 24",
        "stage 2 of 2: healing",
    ]


def test_what_a_terminal_would_obey_is_shown(log):
    log.say("\x1b[2J[bold]x")
    assert lines(log) == ["\\x1b[2J[bold]x"]


def test_bars_move_on_a_terminal_and_are_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = Progress(Terminal())
    for _ in shown.track(range(3), "[evaluate]"):
        shown.best("divergence 0.1")
    shown.close()
    text = shown.console.file.getvalue()
    assert "[evaluate]" in text
    assert "best so far" in text
    assert shown._live is None
    shown.close()


def test_a_loop_that_is_left_early_ends_its_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = Progress(Terminal())
    for _ in shown.track(range(3), "evaluate"):
        break
    assert shown._live is None


def test_quiet_shows_nothing(log, clock):
    log.is_quiet = True
    log.stages("evaluate")
    for _ in log.track(range(30), "evaluate"):
        clock.now += 20
        log.best("x")
    log.say("y")
    log.stage("other")
    assert lines(log) == []


def test_other_processes_of_torchrun_show_nothing(monkeypatch):
    monkeypatch.setattr(ranks, "is_first", lambda: False)
    assert Progress(io.StringIO()).is_quiet


def test_a_command_names_its_stages_on_standard_error_unless_it_is_quiet(call, classifier, data, place):
    pytest.importorskip("torch")
    options = ("--criterion", "taylor", "--pattern", "ffn", "--sparsity", 0.5, "--calibration-samples", 8)
    command = ("prune", classifier, "--data", data, *options, "--output", place / "out", "--json")
    shown = call(*command)
    assert shown.code == 0, shown.err
    told = [line for line in shown.err.splitlines() if line.startswith("stage ")]
    assert told == ["stage 1 of 3: dense model", "stage 2 of 3: taylor for ffn", "stage 3 of 3: evaluate"]
    json.loads(shown.out)
    quiet = call(*command, "--overwrite", "--quiet")
    assert quiet.code == 0, quiet.err
    assert "stage" not in quiet.err
    assert "\r" not in shown.err + quiet.err
