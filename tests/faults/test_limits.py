"""Full disks, size limits, lacking rights and lacking memory: one sentence, exit code 2, and nothing half-written."""

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from secateur.cli import failures, main
from secateur.errors import SecateurError
from secateur.files import check_output, new_folder, write_json
from tests.faults.forks import limit, result

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def sentence_of(done):
    """The one sentence of a command that failed."""
    assert done.code == 2, (done.code, done.text)
    assert "Traceback" not in done.text
    errors = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.text
    return errors[0].removeprefix("error: ")


@pytest.fixture
def prune(classifier, data, place):
    arguments = ["prune", classifier, "--data", data, "--max-length", "16", "--sparsity", "0.5"]
    return lambda *more: main([str(a) for a in (*arguments, "--output", place / "out", *more)])


@pytest.fixture
def train(classifier, data, place):
    arguments = ["train", classifier, "--data", data, "--max-length", "16", "--output", place / "out"]
    return lambda *more: main([str(a) for a in (*arguments, *more)])


def test_a_limit_on_the_size_of_files(prune, place):
    """20,000 bytes hold the config and not the weights."""

    def work():
        limit("RLIMIT_FSIZE", 20_000)
        prune()

    sentence = sentence_of(result(work))
    assert "too large" in sentence
    assert "choose another output" in sentence
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_during_export(classifier, place):
    pytest.importorskip("onnxscript")
    arguments = ["export", str(classifier), "--to", "onnx", "--output", str(place / "out")]

    def work():
        limit("RLIMIT_FSIZE", 10_000)
        main(arguments)

    sentence = sentence_of(result(work))
    assert "large" in sentence or "room" in sentence or "full" in sentence, sentence
    assert list(place.iterdir()) == []


def mounted(folder, size):
    """Mount a small disk that only this process sees; False where that is not allowed."""
    system = ctypes.CDLL(None, use_errno=True)
    new_names, private = 0x00020000, (1 << 18) | (1 << 14)
    return (
        hasattr(system, "unshare")
        and system.unshare(new_names) == 0
        and system.mount(b"none", b"/", None, private, None) == 0
        and system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    )


def test_a_full_disk(prune, place):
    def work():
        if not mounted(place, "64k"):
            os._exit(77)
        try:
            prune()
        finally:
            print("left:", sorted(p.name for p in place.iterdir()))

    done = result(work)
    if done.code == 77:
        pytest.skip("no disk may be mounted here")
    assert "left: []" in done.text
    assert "free some space, or choose another output" in sentence_of(done)


def test_a_parent_that_is_read_only():
    home = Path(tempfile.mkdtemp())
    try:
        home.chmod(0o755)
        (home / "closed").mkdir()
        (home / "closed" / "old").mkdir()
        (home / "closed").chmod(0o555)

        def work():
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            for path in (home / "closed" / "out", home / "closed" / "old", home / "closed" / "deep" / "out"):
                for write in (check_output, new_folder):
                    try:
                        with write(path, overwrite=True):
                            pass
                    except SecateurError as error:
                        print(error)
            try:
                write_json(home / "closed" / "a.json", {})
            except PermissionError as error:
                print(failures.sentence_for(error))

        done = result(work)
        assert done.code == 0, done.text
        assert done.text.count(f"cannot be written: permission denied in {home / 'closed'}; choose another output") == 6
        assert "Permission denied: " in done.text.splitlines()[-1]
        assert sorted(p.name for p in (home / "closed").iterdir()) == ["old"]
    finally:
        shutil.rmtree(home)


# -- memory ---------------------------------------------------------------------------------------------------------


def huge_array(*arguments, **options):
    import numpy as np

    return np.ones(2**36, np.uint8)


def huge_tensor(*arguments, **options):
    import torch

    return torch.ones(2**36, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [huge_array, huge_tensor])
def test_a_limit_on_memory(prune, place, monkeypatch, allocate):
    monkeypatch.setattr("secateur.cli.common.read_data", allocate)

    def work():
        limit("RLIMIT_AS", 2**35)
        prune()

    assert sentence_of(result(work)).startswith("there is not enough memory; choose a smaller model or batch")
    assert list(place.iterdir()) == []


# -- what commands raise ----------------------------------------------------------------------------------------------


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


def outside():
    from concurrent.futures.process import BrokenProcessPool

    import torch
    from safetensors import SafetensorError

    rust = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    memory = "there is not enough memory; choose a smaller model or batch"
    return [
        ("No space left on device; free some space", SafetensorError(rust)),
        ("Permission denied", Exception("Permission denied (os error 13)")),
        ("File too large: weights; free some space", OSError(errno.EFBIG, "File too large", "weights")),
        (memory, MemoryError()),
        (memory, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        (memory, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
        ("a helper process was killed", BrokenProcessPool("A process in the process pool was terminated abruptly")),
        ("the system allows no more threads", RuntimeError("can't start new thread")),
        ("interrupted; nothing was written", KeyboardInterrupt()),
    ]


@pytest.mark.parametrize("where", ["prune", "train"])
def test_errors_of_the_outside(prune, train, place, monkeypatch, capsys, where):
    for sentence, error in outside():
        monkeypatch.setattr("secateur.cli.common.read_data", raising(error))
        with pytest.raises(SystemExit) as caught:
            {"prune": prune, "train": train}[where]()
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert said.startswith(f"error: {sentence}"), said
        assert list(place.iterdir()) == []


def test_errors_of_ours_ask_for_a_report(prune, place, monkeypatch, capsys):
    monkeypatch.setattr("secateur.jobs.prune_model.decide", raising(KeyError("head")))
    with pytest.raises(KeyError):
        prune()
    assert "This is an error of secateur" in capsys.readouterr().err
    assert list(place.iterdir()) == []


def test_what_appears_during_a_command_is_kept(prune, place, monkeypatch, capsys):
    from secateur.jobs import prune_model

    real = prune_model.decide

    def meanwhile(*arguments, **options):
        (place / "out" / ".git").mkdir(parents=True)
        return real(*arguments, **options)

    monkeypatch.setattr(prune_model, "decide", meanwhile)
    with pytest.raises(SystemExit):
        prune("--overwrite")
    assert "out appeared during this run" in capsys.readouterr().err
    assert sorted(p.name for p in place.iterdir()) == ["out", "out.new-1"]
    assert (place / "out.new-1" / "config.json").is_file()
    assert os.listdir(place / "out") == [".git"]
