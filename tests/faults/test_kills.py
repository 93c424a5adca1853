"""Processes killed at random moments: the earlier output is whole or the new one is, and nothing stays hidden."""

import os
import random
import shutil
import sys
import time

import pytest

from secateur.card.write import NAME as CARD
from secateur.files import new_file, new_folder, renames
from secateur.record import NAME as RECORD
from tests.faults.forks import at_a_moment, killed, result

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def contents(folder):
    """Names and bytes of all files; other folders get their whole tree."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_again_and_again(write, place, kills, look, *, gaps=False):
    """Kill `write`, which replaces `place/out`, at random moments; then let it end.

    look: what of an output is compared.
    gaps: whether the output may be away until the next start has put it back.
    """
    out = place / "out"
    write()  # the first time takes longer: it imports
    begun = time.monotonic()
    write()
    longest = time.monotonic() - begun
    new = look(out)
    renames.discard(out)
    out.mkdir()
    (out / "old").write_text("old")
    old = look(out)
    rng, hits = random.Random(len(str(new))), 0
    for _ in range(10 * kills):
        hits += killed(write, at_a_moment(rng, longest, place))
        if not gaps or out.exists():
            assert look(out) in (old, new)
        assert {p.name for p in place.iterdir() if not p.name.startswith(".")} <= {"out"}
        if hits == kills:
            break
    assert hits == kills
    write()
    assert look(out) == new
    assert [p.name for p in place.iterdir()] == ["out"]


@pytest.mark.parametrize("kills", [12, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("way", ["one step", "in turn"])
def test_new_folder(place, monkeypatch, way, kills):
    if way == "in turn":
        monkeypatch.setattr(renames, "_system_call", lambda: None)

    def write():
        with new_folder(place / "out", overwrite=True) as folder:
            for name in "abcdef":
                (folder / name).write_text(name * 100)
                time.sleep(0.001)
            with new_folder(folder / "inner") as inner:
                (inner / "g").write_text("g")

    kill_again_and_again(write, place, kills, contents, gaps=way == "in turn")


@pytest.mark.parametrize("way", ["one step", "in turn"])
def test_every_system_call(place, monkeypatch, way):
    """Die before each call that changes names, one after the other."""
    if way == "in turn":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    out = place / "out"

    def dying(after):
        count = [0]

        def step(real):
            def call(*arguments, **options):
                count[0] += 1
                if count[0] > after:
                    os._exit(7)
                return real(*arguments, **options)

            return call

        def work():
            for name in ("rename", "unlink", "mkdir", "rmdir", "open"):
                setattr(os, name, step(getattr(os, name)))
            renames._renameat2 = step(renames._renameat2)
            with new_folder(out, overwrite=True) as folder:
                (folder / "a").write_text("new")

        return work

    for after in range(200):
        renames.discard(out)
        out.mkdir()
        (out / "a").write_text("old")
        done = result(dying(after))
        if out.exists():
            assert (out / "a").read_text() in ("old", "new")
        else:
            assert way == "in turn"
        with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
            raise KeyboardInterrupt
        assert (out / "a").read_text() in ("old", "new")
        assert [p.name for p in place.iterdir()] == ["out"], after
        if done.code == 0:
            break
    assert done.code == 0
    assert after > 5


def test_a_single_file(place):
    def write():
        with new_file(place / "out", overwrite=True) as file:
            file.write_text("new" * 1000)
            time.sleep(0.002)

    rng = random.Random(0)
    (place / "out").write_text("old")
    for _ in range(8):
        killed(write, at_a_moment(rng, 0.01, place))
        assert (place / "out").read_text() in ("old", "new" * 1000)
    write()
    assert [p.name for p in place.iterdir()] == ["out"]


def test_an_interrupt_in_any_place(place):
    """KeyboardInterrupt raised before each line of the writing: all is cleared without another run."""
    home = os.path.dirname(renames.__file__)
    for after in range(0, 400, 3):
        renames.discard(place / "out")
        (place / "out").mkdir()
        (place / "out" / "a").write_text("old")
        count = [0]

        def trace(frame, event, argument, count=count, after=after):
            if not frame.f_code.co_filename.startswith(home) or frame.f_code.co_name in (
                "_end",
                "clear",
                "release",
                "discard",
            ):
                return None
            if event == "line":
                count[0] += 1
                if count[0] == after + 1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        ended = True
        try:
            sys.settrace(trace)
            with new_folder(place / "out", overwrite=True) as folder:
                (folder / "a").write_text("new")
        except KeyboardInterrupt:
            ended = False
        finally:
            sys.settrace(None)
        assert (place / "out" / "a").read_text() in ("old", "new")
        if ended:
            break
        with new_folder(place / "out", overwrite=True):
            pass
        assert [p.name for p in place.iterdir()] == ["out"]
    assert ended


# -- what commands write --------------------------------------------------------------------------------------------

KILLS = [pytest.param(3, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)]


def command(*arguments):
    from secateur.cli import main

    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 0


def sizes(folder):
    """The size of each file; of the record and the card, which say how long the run took, only that they are there."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): None if p.name in (RECORD, CARD) else p.stat().st_size for p in files}


@pytest.mark.parametrize("kills", KILLS)
def test_prune(classifier, data, place, kills, capfd):
    options = ["--data", data, "--max-length", "16", "--sparsity", "0.5", "--output", place / "out", "--overwrite"]
    kill_again_and_again(lambda: command("prune", classifier, *options), place, kills, sizes)


@pytest.mark.parametrize("kills", KILLS)
def test_export(classifier, place, kills, capfd, monkeypatch, tmp_path):
    """The program is made once, as that takes long, and copied afterwards."""
    pytest.importorskip("onnxscript")
    from secateur.deploy.jobs import export

    make, made = export._write, []

    def write(job, folder):
        if not made:
            made.append(make(job, folder))
            shutil.copytree(folder, tmp_path / "made")
        for file in sorted((tmp_path / "made").iterdir()):
            time.sleep(0.01)
            shutil.copyfile(file, folder / file.name)
        return made[0]

    monkeypatch.setattr(export, "_write", write)
    options = ["--to", "onnx", "--output", place / "out", "--overwrite"]
    kill_again_and_again(lambda: command("export", classifier, *options), place, kills, lambda out: sorted(sizes(out)))


@pytest.mark.parametrize("kills", KILLS)
def test_save_of_a_host_and_of_a_compiled_model(classifier, place, kills):
    import secateur
    from secateur import runtime
    from secateur.kernels.native import load_native

    host = secateur.open(str(classifier))
    plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.7)
    host.apply(plan)
    kill_again_and_again(lambda: host.save(place / "out", plan, overwrite=True), place, kills, sizes)
    if load_native() is None:
        return
    fast = runtime.compile(host.model, measure=False, tokens=16)
    kill_again_and_again(lambda: runtime.save(fast, place / "out", overwrite=True), place, kills, contents)
