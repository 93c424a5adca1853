"""Outputs that appear whole or not at all: claims, replacement, and what appears at the place during a run."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from secateur.errors import SecateurError
from secateur.files import check_output, claims, claims_kept, new_file, new_folder, renames, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, text="mine"):
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(text)


@pytest.fixture(params=["one step", "in turn"])
def way(request, monkeypatch):
    """With the system's exchange of two names, and without."""
    if request.param == "in turn":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    return request.param


# -- what appears during a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_run_is_kept(tmp_path, way, overwrite):
    out = tmp_path / "out"
    said = r"out appeared during this run.*result of this run is in .*out\.new-1"
    with pytest.raises(SecateurError, match=said), new_folder(out, overwrite=overwrite) as folder:
        write(folder, "result")
        write(out, "mine")
    assert names(tmp_path) == ["out", "out.new-1"]
    assert (out / "a").read_text() == "mine"
    assert (tmp_path / "out.new-1" / "a").read_text() == "result"


def test_a_folder_that_changes_during_a_run_is_kept(tmp_path, way):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(SecateurError, match=r"out changed during this run"), new_folder(out, overwrite=True) as folder:
        write(folder, "result")
        (out / ".git").mkdir()
    assert names(tmp_path) == ["out", "out.new-1"]
    assert names(out) == [".git", "a"]


def test_another_folder_of_that_name_is_kept(tmp_path, way):
    out = tmp_path / "out"
    write(out, "old")
    write(tmp_path / "out.new-1", "earlier")
    with pytest.raises(SecateurError, match=r"out\.new-2"), new_folder(out, overwrite=True) as folder:
        write(folder, "result")
        out.rename(tmp_path / "moved")
        write(out, "mine")
    assert names(tmp_path) == ["moved", "out", "out.new-1", "out.new-2"]
    assert (out / "a").read_text() == "mine"


def test_what_comes_between_the_look_and_the_rename_is_kept(tmp_path, way, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    look, times = renames.identity, []

    def late(path):
        found = look(path)
        if path == out and len(times) == 0 and (tmp_path / "ready").exists():
            times.append(1)
            out.rename(tmp_path / "moved")
            write(out, "mine")
        return found

    monkeypatch.setattr(renames, "identity", late)
    with pytest.raises(SecateurError, match=r"out changed"), new_folder(out, overwrite=True) as folder:
        write(folder, "result")
        (tmp_path / "ready").touch()
    assert times
    assert (out / "a").read_text() == "mine"
    assert names(tmp_path) == ["moved", "out", "out.new-1", "ready"]


def test_a_folder_that_vanished_during_a_run(tmp_path, way):
    out = tmp_path / "out"
    write(out, "old")
    with new_folder(out, overwrite=True) as folder:
        write(folder, "result")
        out.rename(tmp_path / "moved")
    assert (out / "a").read_text() == "result"
    assert names(tmp_path) == ["moved", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_appears_during_a_run_is_kept(tmp_path, way, overwrite):
    plot = tmp_path / "plot.png"
    said = r"plot.png appeared.*plot\.png\.new-1"
    with pytest.raises(SecateurError, match=said), new_file(plot, overwrite=overwrite) as file:
        assert file.suffix == ".png"
        file.write_text("result")
        plot.write_text("mine")
    assert plot.read_text() == "mine"
    assert names(tmp_path) == ["plot.png", "plot.png.new-1"]


def test_what_appears_after_the_first_check_is_kept(tmp_path):
    out = tmp_path / "out"
    with claims_kept():
        check_output(out, overwrite=True)
        write(out, "mine")
        with pytest.raises(SecateurError, match="appeared during this run"), new_folder(out, overwrite=True) as folder:
            write(folder, "result")
    assert (out / "a").read_text() == "mine"
    assert names(tmp_path) == ["out", "out.new-1"]


# -- replacement ----------------------------------------------------------------------------------------------------


def test_folders_files_and_links_are_replaced(tmp_path, way):
    out = tmp_path / "out"
    write(tmp_path / "elsewhere")
    for make in (lambda: write(out), lambda: out.write_text("file"), lambda: out.symlink_to(tmp_path / "elsewhere")):
        make()
        with new_folder(out, overwrite=True) as folder:
            write(folder, "new")
        assert (out / "a").read_text() == "new"
        assert not out.is_symlink()
        renames.discard(out)
    assert names(tmp_path) == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "a").read_text() == "mine"


def test_a_run_may_write_its_output_twice_and_within_itself(tmp_path):
    out = tmp_path / "out"
    with claims_kept():
        check_output(out, overwrite=True)
        for text in ("one", "two"):
            with new_folder(out, overwrite=True) as folder, new_folder(folder, overwrite=True) as inner:
                write(inner, text)
                with new_folder(inner / "part") as part:
                    write(part)
                with pytest.raises(SecateurError, match="exists"), new_folder(inner / "part"):
                    pass
            assert (out / "a").read_text() == text
            assert names(out) == ["a", "part"]
        assert names(tmp_path) == [".out.claim", "out"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("length", [120, 151, 200, 245])
def test_long_names(tmp_path, length):
    out = tmp_path / ("ü" + "x" * (length - 2))
    for _ in range(2):
        with new_folder(out, overwrite=True) as folder, new_folder(folder, overwrite=True) as inner:
            write(inner)
    assert names(tmp_path) == [out.name]


def test_parents_are_made_and_removed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with claims_kept():
        check_output(tmp_path / "a" / "one", overwrite=False)
        check_output(tmp_path / "a" / "two", overwrite=False)
    assert names(tmp_path) == []


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    import time

    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: 3600 * 10**9 * next(hours))
    out = tmp_path / "out"
    for text in ("one", "two"):
        with new_folder(out, overwrite=True) as folder:
            write(folder, text)
            os.utime(folder, (0, 0))
        assert (out / "a").read_text() == text
    assert names(tmp_path) == ["out"]


def test_json_is_whole_and_leaves_nothing(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    (tmp_path / f".a.json.{'0' * 16}.tmp").write_text("of a killed process")
    (tmp_path / ".a.json.mine.tmp").write_text("of somebody else")
    write_json(file, {"a": 2})
    assert file.read_text() == '{\n  "a": 2\n}\n'
    assert names(tmp_path) == [".a.json.mine.tmp", "a.json"]


# -- two writers ----------------------------------------------------------------------------------------------------


def test_two_writers_in_one_process(tmp_path):
    out = tmp_path / "out"
    errors = []

    def second():
        try:
            with new_folder(out, overwrite=True):
                pass
        except SecateurError as error:
            errors.append(str(error))

    with new_folder(out, overwrite=True) as folder:
        write(folder, "first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert re.match(rf"process {os.getpid()} on {re.escape(socket.gethostname())} is writing .*out; wait", errors[0])
    assert (out / "a").read_text() == "first"


HOLD = """
import sys
from pathlib import Path
from secateur.files import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "a").write_text("half")
    print("ready", flush=True)
    sys.stdin.readline()
    (folder / "a").write_text("whole")
"""


def holding(out):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes(tmp_path):
    out = tmp_path / "out"
    first = holding(out)
    with pytest.raises(SecateurError, match=rf"process {first.pid} on .* is writing .*out; wait for it, choose"):
        check_output(out, overwrite=True)
    with pytest.raises(SecateurError, match=rf"process {first.pid} on"), new_folder(out, overwrite=True):
        pass
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0
    assert (out / "a").read_text() == "whole"
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_cleared_and_said(tmp_path, caplog):
    out = tmp_path / "out"
    write(out, "old")
    first = holding(out)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert len(names(tmp_path)) == 3
    with new_folder(out, overwrite=True) as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]
    assert f"process {first.pid} on {socket.gethostname()} was writing {out} and is gone" in caplog.text


def claim_of(out, **values):
    """A claim's file as another process would have written it."""
    parent = {"claim": 1, "host": socket.gethostname(), "pid": os.getppid(), "started": claims._started(os.getppid())}
    write_json(claims.file_of(out), {**parent, "id": "0123456789abcdef", "seen": "", **values})


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell when a process started")
def test_who_is_alive(tmp_path):
    out = tmp_path / "out"
    boot, space, ticks = claims._started(os.getppid()).split("/")
    for dead in (
        {"started": f"{boot}/{space}/{int(ticks) + 1}"},  # the number was given to another process
        {"started": f"another/{space}/{ticks}"},  # the machine was started again
        {"pid": 2**22 + 1},
    ):
        claim_of(out, **dead)
        with new_folder(out, overwrite=True):
            pass
        assert names(tmp_path) == ["out"]
    for alive in ({"host": "elsewhere"}, {"started": f"{boot}/pid:[1]/{ticks}", "pid": 2**22 + 1}, {}):
        claim_of(out, **alive)
        with pytest.raises(SecateurError, match=r"is writing .*delete .*\.out\.claim if that process is gone"):
            check_output(out, overwrite=True)
        claims.file_of(out).unlink()


def test_a_system_that_tells_nothing_about_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PROC", tmp_path / "absent")
    out = tmp_path / "out"
    claim_of(out, started="")
    with pytest.raises(SecateurError, match="is writing"):
        check_output(out, overwrite=True)
    claim_of(out, started="", pid=2**22 + 1)
    with new_folder(out):
        pass
    assert names(tmp_path) == ["out"]


def test_a_file_that_is_no_claim_is_left_alone(tmp_path):
    (tmp_path / ".out.claim").write_text("mine")
    with pytest.raises(SecateurError, match=r"\.out\.claim is damaged.*delete it if nothing writes there"):
        check_output(tmp_path / "out", overwrite=True)
    assert (tmp_path / ".out.claim").read_text() == "mine"


# -- what a killed process leaves between two renames ---------------------------------------------------------------

ID = "0123456789abcdef"


def killed(out, seen):
    claim_of(out, pid=2**22 + 1, started="", seen=seen)


def after(tmp_path, monkeypatch):
    """Begin a run that fails: what is there afterwards is what its start made of it."""
    monkeypatch.setattr(claims, "PROC", tmp_path / "absent")  # numbers of processes alone
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    return {path.name: (path / "a").read_text() for path in tmp_path.iterdir()}


def test_the_earlier_output_is_put_back(tmp_path, monkeypatch, caplog):
    write(tmp_path / f".out.{ID}.old", "old")
    write(tmp_path / f".out.{ID}.swap", "new")
    killed(tmp_path / "out", renames.identity(tmp_path / f".out.{ID}.old"))
    monkeypatch.setattr(claims, "PROC", tmp_path / "absent")
    with pytest.raises(SecateurError, match="exists"), new_folder(tmp_path / "out"):
        pass
    assert after(tmp_path, monkeypatch) == {"out": "old"}
    assert "out is again what it was before the run that was killed" in caplog.text


def test_the_earlier_output_is_deleted_once_the_new_one_has_its_name(tmp_path, monkeypatch):
    for word in ("old", "swap"):
        renames.discard(tmp_path / "out")
        write(tmp_path / f".out.{ID}.{word}", "old")
        killed(tmp_path / "out", renames.identity(tmp_path / f".out.{ID}.{word}"))
        write(tmp_path / "out", "new")
        assert after(tmp_path, monkeypatch) == {"out": "new"}


def test_a_result_that_never_got_its_name_is_deleted(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    write(tmp_path / f".out.{ID}.swap", "new")
    write(tmp_path / f".out.{ID}.new.{ID[:8]}", "half")
    write(tmp_path / f".out.{ID}.done", "half")
    killed(tmp_path / "out", renames.identity(tmp_path / "out"))
    assert after(tmp_path, monkeypatch) == {"out": "old"}


@pytest.mark.parametrize("word", ["old", "swap"])
def test_what_may_be_somebody_elses_gets_a_visible_name(tmp_path, monkeypatch, caplog, word):
    write(tmp_path / "out", "one")
    write(tmp_path / f".out.{ID}.{word}", "two")
    killed(tmp_path / "out", "1:2:3")
    shown = "out.old-1" if word == "old" else "out.kept-1"
    assert after(tmp_path, monkeypatch) == {"out": "one", shown: "two"}
    assert f"a killed run left what is now {tmp_path / shown}" in caplog.text


def test_folders_of_other_outputs_are_left_alone(tmp_path, monkeypatch):
    write(tmp_path / f".out2.{ID}.new")
    write(tmp_path / ".out.mine")
    write(tmp_path / f".out.{ID}")
    write(tmp_path / f".out.{ID}.new", "ours")
    found = after(tmp_path, monkeypatch)
    assert sorted(found) == [f".out.{ID}", ".out.mine", f".out2.{ID}.new"]
