"""Every option belongs to a kind of run, and is refused in the others instead of being ignored."""

import pytest
import typer

from secateur.cli import app, kinds

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", kinds.TABLES)
def test_every_option_stands_in_the_table_and_no_other(command):
    words = {kind for group in kinds.TABLES[command] for kind in group.split()}
    assert words <= set(kinds.KINDS)
    placed = set().union(*(kinds.options_of(command, kind) for kind in words))
    assert placed == {p.name for p in COMMANDS[command].params} - {"help"}
    for name, others in kinds.NEEDS.get(command, {}).items():
        assert {name, *others} <= placed


def test_every_kind_of_run_is_one_of_a_command():
    found = [kind for table in kinds.TABLES.values() for group in table for kind in group.split()]
    assert set(found) == set(kinds.KINDS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--threshold", "0.01", "--budget", "global"], "--budget does nothing without --sparsity or --sweep"),
        (["--pattern", "2:4", "--budget", "nonsense"], "--budget does nothing without --sparsity or --sweep"),
        (
            ["--sweep", "0.1", "--sweep-by", "threshold", "--budget", "global"],
            "--budget has no meaning in a --sweep of",
        ),
        (["--sparsity", "0.5", "--gradual"], "--gradual does nothing without --fine-tune"),
        (["--sparsity", "0.5", "--learning-rate", "1", "--fine-tune", "0"], "--learning-rate does nothing without"),
        (["--sweep", "0.1", "--uniform"], "--uniform has no meaning in a --sweep, which"),
        (["--sweep", "0.1", "--gradual"], "--gradual has no meaning in a --sweep, which"),
        (["--sparsity", "0.5", "--sweep-by", "sparsity"], "--sweep-by does nothing without --sweep"),
        (["--sparsity", "0.5", "--for", "vllm"], "--for has no meaning in a run without --calibration"),
        (["--sparsity", "0.5", "--memory", "4GiB"], "--memory has no meaning in a run without --calibration"),
    ],
)
def test_prune(refused, classifier, data, place, options, sentence):
    assert sentence in refused("prune", classifier, "--data", data, "--output", place / "out", *options)


def test_the_other_commands(refused, classifier, data, place):
    export = ["export", classifier, "--to", "onnx", "--output", place / "out"]
    assert "--value does nothing without --sparse" in refused(*export, "--value", "int8")
    assert "--tokens does nothing without --sparse" in refused(*export, "--tokens", 3)
    assert "--samples does nothing without --data" in refused(*export, "--samples", 3)
    sentence = refused("eval", classifier, "--data", data, "--text", data)
    assert sentence == "--text has no meaning in a run without --task perplexity; leave it out"
    assert "--turns has no meaning in showing --results" in refused("bench", "--results", place, "--turns", 3)
    assert "--plot has no meaning in writing an --export-kit" in refused(
        "bench", classifier, "--export-kit", place / "kit", "--plot", place / "plot.png"
    )
    assert "--new-tokens has no meaning in running a model that writes no text" in refused(
        "run", classifier, "a", "--new-tokens", 3
    )
    assert "--split does nothing without --data" in refused("run", classifier, "a", "--split", "train")
