"""Every reader on damaged files: a fixed sample, the kept cases, and the net itself."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import corpus, mutate, run

ROOT = Path(__file__).parents[2]
LIGHT = ("plan", "record", "recipe", "layout", "artefact", "inputs", "blobs", "chains")
linux = pytest.mark.skipif(sys.platform != "linux", reason="children have limits that Linux keeps")


def fuzz(tmp_path, *options):
    """The command in a process of its own, whose threads and imports no other test decides."""
    command = [sys.executable, "-m", "tests.fuzz", "--json", str(tmp_path / "said.json"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert (tmp_path / "said.json").exists(), done.stderr[-3000:]
    return done, json.loads((tmp_path / "said.json").read_text())


@linux
def test_a_sample_of_the_formats_without_torch(tmp_path):
    done, said = fuzz(tmp_path, "--light", "--sample", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(said) == set(LIGHT)
    assert all(result["cases"] >= 6 for result in said.values())


@linux
@pytest.mark.slow
def test_a_sample_of_every_format(tmp_path):
    for package in ("torch", "transformers", "onnxruntime", "pandas"):
        pytest.importorskip(package)
    done, said = fuzz(tmp_path, "--sample", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(said) > {*LIGHT, "model-folder", "compiled", "journal"}


# -- kept cases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of the kept cases, those without torch and all."""
    known = {}

    def of(*, light):
        if light not in known:
            named = {corpus.read(path)["format"] for path in corpus.files()}.difference(LIGHT, ["keras"])
            which = ["--light"] if light else [word for name in sorted(named) for word in ("--format", name)]
            known[light] = fuzz(tmp_path_factory.mktemp("kept"), "--corpus", *which)[1]
        return known[light]

    return of


def kept_cases():
    """A parameter for each kept case; those that need torch are slow, and those that are still wrong may fail."""
    for path in corpus.files():
        entry = corpus.read(path)
        marks = [pytest.mark.slow] if entry["format"] not in LIGHT else []
        if "open" in entry:
            marks.append(pytest.mark.xfail(strict=False, reason=entry["open"]))
        yield pytest.param(path.name, entry["format"] in LIGHT, marks=marks, id=path.stem)


@linux
@pytest.mark.parametrize(("name", "light"), list(kept_cases()))
def test_kept_cases(name, light, outcomes):
    outcome = outcomes(light=light).get(name)
    if outcome is None:
        pytest.skip("its format runs only when it is named")
    assert outcome in ("loaded", "refused"), outcome


# -- the net itself ---------------------------------------------------------------------------------------------------


class Expected(ValueError):
    """What the readers here may raise."""


def reader(text):
    """A format whose only file holds the name of something that its reader does."""

    def read(folder):
        return ACTIONS[(folder / "a.txt").read_text()](folder)

    return run.Format("made", lambda: {"seed": {"a.txt": b"load"}}, read, (Expected,)), {"a.txt": text.encode()}


def refuse(message):
    raise Expected(message)


ACTIONS = {
    "load": lambda folder: 1,
    "refuse": lambda folder: refuse("one line"),
    "lines": lambda folder: refuse("two\nlines"),
    "long": lambda folder: refuse("x" * 1000),
    "silent": lambda folder: refuse(""),
    "raise": lambda folder: {}["a"],
    "work": lambda folder: sum(range(10**11)),
    "count": lambda folder: [None for _ in iter(int, 1) if _],
    "wait": lambda folder: time.sleep(60),
    "crash": lambda folder: ctypes.string_at(0),
    "exit": lambda folder: os._exit(3),
    "memory": lambda folder: bytearray(2**40),
    "unequal": lambda folder: time.perf_counter(),
    "program": lambda folder: os.system("true"),
    "write": lambda folder: (folder.parent / "beside").write_text("x"),
    "remove": lambda folder: (folder.parent / "stack").unlink(),
    "read": lambda folder: (folder.parent / "canary" / "a").read_text(),
}


@linux
@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        ("load", "loaded"),
        ("refuse", "refused"),
        ("lines", "made: message has lines"),
        ("long", "made: message has long"),
        ("silent", "made: message is long"),
        ("raise", "made: KeyError"),
        ("work", "made: native hang"),
        ("count", "made: Hang"),
        ("wait", "made: native hang"),
        ("crash", "made: SIGSEGV"),
        ("exit", "made: exit 3"),
        ("memory", "made: MemoryError"),
        ("unequal", "made: unequal"),
        ("program", "made: os.system outside"),
        ("write", "made: writes outside"),
        ("remove", "made: os.remove outside"),
        ("read", "made: reads outside"),
    ],
)
def test_what_a_reader_may_not_do(action, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.2)
    monkeypatch.setattr(run, "SILENCE", 2 if "native" in outcome else 60)
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "a").write_text("x")
    form, case = reader(action)
    ((number, found),) = run.in_child(form, lambda i: case, [7], tmp_path)
    assert number == 7
    assert (found if isinstance(found, str) else found["key"]).startswith(outcome)


@linux
def test_other_cases_run_after_a_crash(tmp_path):
    form, _ = reader("load")
    actions = ["load", "crash", "refuse", "exit", "load"]
    found = list(run.in_child(form, lambda i: {"a.txt": actions[i].encode()}, range(5), tmp_path))
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert [outcome for _, outcome in found if isinstance(outcome, str)] == ["loaded", "refused", "loaded"]


def test_the_same_seed_gives_the_same_cases():
    from tests.fuzz.formats import LIGHT as forms

    for form in forms:
        seeds = form.seeds()
        made = [run.make(form, seeds, 5, number) for number in range(20)]
        assert made == [run.make(form, seeds, 5, number) for number in range(20)]
        assert len({words for _, _, words in made}) > 10
        assert made != [run.make(form, seeds, 6, number) for number in range(20)]


def test_json_keeps_its_order_and_its_double_keys():
    text = '{"b": [1, {"a": null, "a": "x"}], "a": {}}'
    assert mutate.dump(mutate.parse(text)) == text
    damaged = {mutate.damage_json(text.encode(), Random(seed)) for seed in range(300)}
    assert len(damaged) > 150
    assert any(b"1e400" in data for data, _ in damaged)
    assert any(data.count(b"[") > 900 for data, _ in damaged)


def test_kept_cases_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HERE", tmp_path)
    seeds = {"seed": {"a.txt": b"load", "b.bin": Random(1).randbytes(20_000), "c.txt": b"c"}}
    form = run.Format("made", lambda: seeds, len, ())
    changed = seeds["seed"]["b.bin"][:500] + b"xyz" + seeds["seed"]["b.bin"][510:]
    found = run.Find("made", "made: x", "what", "a.py:1", 3, "seed", "done", {"a.txt": b"\xff", "b.bin": changed})
    path = corpus.keep(form, found)
    assert corpus.files() == [path]
    assert corpus.case_of(corpus.read(path), seeds) == found.case
    assert path.stat().st_size < 600
    corpus.settle(path, {"key": "made: y", "what": "else", "where": "b.py:2"})
    assert corpus.read(path)["key"] == "made: y"
    assert corpus.read(path)["open"] == "else (b.py:2)"
    corpus.settle(path, "refused")
    assert "open" not in corpus.read(path)
