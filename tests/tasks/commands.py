"""The command line, called in this process by tests of tasks."""

import json

import pytest

from secateur.cli import main


def call(capsys, *arguments):
    """Run a command: exit code, standard output, standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def result(capsys, *arguments):
    """Run a command with --json: what it printed, parsed."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments):
    """Run a command that has to fail with exit code 2: its one sentence."""
    code, _, err = call(capsys, *arguments)
    assert code == 2, err
    assert "Traceback" not in err
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return sentence.removeprefix("error: ")
