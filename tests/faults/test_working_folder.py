"""The working folder of a streamed run: its result takes its place whole, whatever lies there or kills it."""

import contextlib
import os

import pytest

from secateur.errors import SecateurError
from secateur.files import renames
from secateur.torch.stream.journal import workspace
from tests.faults.forks import result

BLOCK = {"path": "a", "file": "block", "error": None, "tuned": None, "layers": [], "sha256": "00", "seconds": 1.0}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


@pytest.fixture(params=["one step", "in turn"])
def way(request, monkeypatch):
    """With the system's exchange of two names, and without."""
    if request.param == "in turn":
        monkeypatch.setattr(renames, "_system_call", lambda: None)
    return request.param


def run(out, meanwhile=lambda: None, *, overwrite):
    """A run of one block."""
    with workspace(out, {"recipe": {}}, overwrite=overwrite) as work:
        if not work.journal.blocks:
            (work.result / "block").write_text("new")
            work.journal.blocks.append(BLOCK)
            work.commit()
        meanwhile()
        work.finish()


def old(out):
    renames.discard(out)
    out.mkdir()
    (out / "block").write_text("old")


def dying(after, out, *, overwrite):
    """A run that dies before its next call to the system but `after`."""
    count = [0]

    def step(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] > after:
                os._exit(7)
            return real(*arguments, **options)

        return call

    def work():
        for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "open"):
            setattr(os, name, step(getattr(os, name)))
        renames._renameat2 = step(renames._renameat2)
        run(out, overwrite=overwrite)

    return work


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_dies_before_any_call_is_continued(tmp_path, way, overwrite):
    out = tmp_path / "out"
    for after in range(100):
        renames.discard(out)
        if overwrite:
            old(out)
        done = result(dying(after, out, overwrite=overwrite))
        assert done.code in (0, 7), done.text
        if out.exists():
            assert (out / "block").read_text() in ("old", "new")
        else:
            assert not overwrite or way == "in turn"
        if done.code == 7 or overwrite:  # one that died after its last step is refused
            with contextlib.suppress(SecateurError):
                run(out, overwrite=overwrite)
        assert (out / "block").read_text() == "new"
        assert os.listdir(tmp_path) == ["out"], after
        if done.code == 0:
            break
    assert after > 15
    assert done.code == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_run_is_kept(tmp_path, way, overwrite):
    out = tmp_path / "out"
    with pytest.raises(SecateurError, match=r"appeared or changed during this run.*out\.new-1"):
        run(out, lambda: old(out), overwrite=overwrite)
    assert (out / "block").read_text() == "old"
    assert (tmp_path / "out.new-1" / "block").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["out", "out.new-1"]


def test_what_changes_during_a_run_is_kept(tmp_path, way):
    out = tmp_path / "out"
    old(out)
    with pytest.raises(SecateurError, match=r"appeared or changed"):
        run(out, lambda: (out / "mine").touch(), overwrite=True)
    assert sorted(os.listdir(out)) == ["block", "mine"]


def test_another_run_is_refused_by_name(tmp_path):
    out = tmp_path / "out"

    def second():
        done = result(lambda: run(out, overwrite=True))
        assert f"process {os.getpid()} on " in done.text, done.text

    run(out, second, overwrite=True)
    assert (out / "block").read_text() == "new"
