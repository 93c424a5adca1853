"""Measuring: a real pair on ONNX Runtime, the same on PyTorch, and what a pair says of its times."""

import json

import pytest

from secateur.deploy.jobs.pairs import LEAST_TURNS, Pairs, time_pairs
from secateur.search.measure import measure
from secateur.search.target import Call
from tests.text_models import write_classifier, write_model


class Steady:
    """A worker whose runs take given seconds, one after the other."""

    def __init__(self, *seconds):
        self.seconds, self.runs = seconds, 0

    def time(self, runs):
        found = [self.seconds[(self.runs + i) % len(self.seconds)] for i in range(runs)]
        self.runs += runs
        return found


def test_a_pair_is_known_by_its_ratios():
    pairs = Pairs([2.0, 2.0, 2.0, 4.0], [1.0, 1.2, 0.8, 2.0])
    assert pairs.ratios == [0.4, 0.5, 0.5, 0.6]
    assert pairs.ratio == 0.5
    assert pairs.interval == (0.4, 0.6)
    assert pairs.uncertainty == pytest.approx(0.2)
    assert pairs.quartiles == pytest.approx((0.425, 0.575))


def test_the_interval_of_a_median_is_that_of_order_statistics():
    """Of 100 ratios, the median lies between the 41st and the 60th with 95%: 50 - 9.8 and 50 + 9.8."""
    pairs = Pairs([1.0] * 100, [1 + i / 100 for i in range(100)])
    assert pairs.interval == (1.40, 1.60)


def test_timing_ends_when_the_ratio_is_known():
    assert len(time_pairs(Steady(0.2), Steady(0.1)).first) == LEAST_TURNS
    noisy = time_pairs(Steady(0.2), Steady(0.1, 0.12, 0.09, 0.2), turns=20)
    assert len(noisy.first) == 20
    assert len(time_pairs(Steady(0.2), Steady(0.1, 0.2), seconds=0.0).first) == 1


def test_short_runs_are_repeated_in_a_turn():
    short, long = Steady(0.002), Steady(0.4)
    time_pairs(short, Steady(0.002), turns=1)
    time_pairs(long, Steady(0.4), turns=1)
    assert (short.runs, long.runs) == (1 + 50, 1 + 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return write_classifier(home / "dense", layers=3), write_classifier(home / "small", layers=1)


@pytest.mark.slow
def test_two_folders_are_measured_on_a_runtime(folders, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = []
    found = measure(*folders, Call("onnxruntime", 2, 9), tmp_path / "work", within=0.5, most_s=2, say=said.append)
    assert (found.runtime, found.batch, found.length, found.threads) == ("onnx", 2, 9, 1)
    assert found.interval[0] <= found.speed_up <= found.interval[1]
    assert found.spread[0] <= found.speed_up <= found.spread[1]
    assert 0 < found.bytes < found.dense_bytes
    assert found.memory > 0
    assert found.parity["relative_error"] < found.parity["tolerance"]
    assert (found.artefact / "artefact.json").is_file()
    assert (found.token_speed_up, found.token_ms) == (None, None)
    assert said[:2] == ["onnx: dense", "onnx: small"]
    assert json.loads(json.dumps(found.as_json()))["turns"] == found.turns
    again = measure(
        *folders, Call("onnx", 2, 9), tmp_path / "work", dense_artefact=found.dense_artefact, within=0.5, most_s=1
    )
    assert again.dense_artefact == found.dense_artefact
    assert again.artefact != found.artefact
    assert again.artefact.is_dir()


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["torch", "secateur"])
def test_our_own_runtimes_are_measured_alike(folders, tmp_path, runtime):
    found = measure(*folders, Call(runtime, 1, 5), tmp_path, within=0.5, most_s=1)
    assert (found.runtime, found.parity) == (runtime, None)
    assert found.ms > 0
    assert 0 < found.bytes < found.dense_bytes


@pytest.mark.long
def test_a_decoder_is_measured_at_one_token_too(tmp_path):
    write_model(tmp_path / "dense")
    write_model(tmp_path / "small", num_hidden_layers=1)
    found = measure(
        tmp_path / "dense", tmp_path / "small", Call("torch", 1, 5), tmp_path / "work", within=0.5, most_s=1
    )
    assert found.token_ms > 0
    assert found.token_speed_up > 0
