"""What a file holds never commands the terminal: whatever is printed goes through `secateur.errors.printable`."""

import ast
import json
from pathlib import Path

import pytest

from secateur import cli
from secateur.deploy import runner
from secateur.errors import DataError, SecateurError, printable
from tests.text_models import write_classifier
from tests.torch.files.shrunk import edit

BAD = "\x1b]0;title\x07 \x9b31m\r\x7f \u202eodd [/b] \U000e0041"
SHOWN = r"\x1b]0;title\x07 \x9b31m\r\x7f \u202eodd [/b] \U000e0041"
COMMANDS = Path(cli.__file__).parent


def controls(text):
    return {c for c in text if not c.isprintable()} - {"\n", "\t"}


def test_printable():
    assert printable(BAD) == SHOWN
    assert printable("größe 漢字 🌱 ") == "größe 漢字 🌱 "
    assert printable("a\nb\t\ud800", keep="\n\t") == "a\nb\t\\ud800"
    assert runner.printable(BAD) == SHOWN
    assert str(SecateurError(f"a\nb {BAD}")) == f"a b {SHOWN}".replace(r"m\r", "m ")
    assert len(str(DataError("\x1b" * 1000))) == 900


def write_results(folder):
    row = {"model": f"a{BAD}", "runtime": f"r{BAD}", "batch": 8, "length": 64}
    times = {"median_ms": 4.0, "low_ms": 3.0, "high_ms": 5.0}
    rows = [{**row, **times}, {**row, "error": f"failed {BAD}"}]
    data = {"format": 1, "kit": "k", "threads": 2, "machine": {"processor": f"p{BAD}"}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(data))


def test_results_of_a_kit(call, tmp_path):
    write_results(tmp_path)
    done = call("bench", "--results", tmp_path)
    assert done.code == 0, done.err
    assert not controls(done.out + done.err)
    assert f"r{SHOWN}, a{SHOWN}, 8 x 64: failed {SHOWN}" in done.out
    printed = call("bench", "--results", tmp_path, "--json").out
    assert not controls(printed)
    assert [r["model"] for r in json.loads(printed)["rows"]] == [f"a{BAD}"] * 2


def test_labels_and_texts(call, tmp_path):
    pytest.importorskip("torch")
    folder = write_classifier(tmp_path / "model")
    edit(folder / "config.json", lambda c: c.update(id2label={"0": f"x{BAD}", "1": f"x{BAD}"}))
    done = call("run", folder, f"good film {BAD}")
    assert done.code == 0, done.err
    assert not controls(done.out)
    assert done.out.startswith(f"x{SHOWN}\t")
    assert done.out.endswith(f"good film {SHOWN}\n")


def test_messages_of_the_command_line(refused, tmp_path):
    assert SHOWN.replace(r"m\r", r"m ") in refused("inspect", f"{tmp_path}/{BAD}")
    assert SHOWN.split()[0] in refused("inspect", f"--{BAD}")


def test_commands_print_in_no_other_way():
    """Each call that prints names `printable`, but for texts of our own and a table of printable cells."""
    found = set()
    for path in sorted(COMMANDS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("echo", "secho", "print"):
                found.add((path.name, ast.unparse(node)))
    assert len(found) > 5
    others = {(name, call) for name, call in found if "printable(" not in call and "secateur {__version__}" not in call}
    assert others == {("__init__.py", "typer.echo(__version__)"), ("common.py", "console.print(table)")}
