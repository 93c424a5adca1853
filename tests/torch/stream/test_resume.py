"""Runs that are stopped or killed: taken up where they were, to the same files; other settings are refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.torch.stream import run as stream
from secateur.torch.stream.run import prune_folder
from tests import zoo
from tests.text_models import write_model
from tests.torch.language import Stop, files, recipe, stopped_after, windows

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.mark.parametrize(
    ("make", "tuned", "on_disk"),
    [
        (zoo.llama, False, False),
        pytest.param(zoo.llama, True, True, marks=pytest.mark.slow),
        pytest.param(zoo.t5, True, False, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_files(make, tuned, on_disk, tmp_path, monkeypatch):
    write_model(tmp_path / "in", make)
    prune_folder(tmp_path / "in", tmp_path / "whole", windows(), recipe(reconstruct=tuned))
    choose = stream.choose
    monkeypatch.setattr(
        stream, "choose", lambda *a, **k: stream.MemoryPlan(choose(*a, **k).batch, on_disk, choose(*a, **k).expected)
    )
    with pytest.raises(Stop):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(reconstruct=tuned), stopped_after(2))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "states").exists() == on_disk
    ran = []
    real = stream.Run.advance
    monkeypatch.setattr(stream.Run, "advance", lambda run, *a: ran.append(len(run.finished)) or real(run, *a))
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(reconstruct=tuned))
    assert report.resumed == 2
    assert (0 in ran) != on_disk  # states on disk are taken up, others are made again
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.slow
def test_damaged_states_are_made_again(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    prune_folder(tmp_path / "in", tmp_path / "whole", windows(), recipe())
    choose = stream.choose
    monkeypatch.setattr(
        stream, "choose", lambda *a, **k: stream.MemoryPlan(choose(*a, **k).batch, on_disk=True, expected=0)
    )
    with pytest.raises(Stop):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(), stopped_after(2))
    state = next((tmp_path / ".out.partial" / "states").iterdir())
    state.write_bytes(state.read_bytes()[:-4] + b"abcd")
    assert prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe()).resumed == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
def test_another_recipe_model_or_text_is_refused(tmp_path):
    write_model(tmp_path / "in")

    def run(ids=None, **values):
        prune_folder(tmp_path / "in", tmp_path / "out", windows() if ids is None else ids, recipe(**values))

    with pytest.raises(Stop):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(), stopped_after(1))
    with pytest.raises(SecateurError, match=r"started with recipe pattern 2:4, now it is 4:8; .*delete that folder"):
        run(pattern="4:8")
    with pytest.raises(SecateurError, match="started with calibration tokens"):
        run(windows(seed=1))
    write_model(tmp_path / "in", intermediate_size=52)
    with pytest.raises(SecateurError, match="started with model model-0000"):
        run()


def test_a_finished_output_is_not_overwritten(tmp_path):
    write_model(tmp_path / "in")
    prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    with pytest.raises(SecateurError, match="exists; choose another output"):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(pattern="4:8"))
    prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(pattern="4:8"), overwrite=True)
    assert json.loads((tmp_path / "out" / "pruned.json").read_text())["recipe"]["pattern"] == "4:8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


RUN = """
import sys, torch
torch.set_num_threads(1)
from tests.torch.language import recipe, windows
from secateur.torch.stream import run as stream
from pathlib import Path
choose = stream.choose
disk = sys.argv[2] == "disk"
stream.choose = lambda *a, **k: stream.MemoryPlan(choose(*a, **k).batch, disk, 0)
here = Path(sys.argv[1])
print("ready", flush=True)
stream.prune_folder(here / "in", here / "out", windows(48, 48), recipe(reconstruct=True, distil={"passes": 1}))
"""


def kill_until_done(folder, kills, kept, seed):
    """Start the run again and again; it is killed at random moments, half the time while a shard is being written. A
    run that ends before all kills have hit is compared with the whole one and begun again.
    """
    rng = random.Random(seed)
    hit = 0
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root}/src:{root}", "OMP_NUM_THREADS": "1"}
    while True:
        command = [sys.executable, "-c", RUN, str(folder), kept]
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if hit < kills:
            until = time.monotonic() + rng.uniform(0.5, 5.0)
            writing = rng.random() < 0.5
            while process.poll() is None and (writing or time.monotonic() < until):
                if writing and any(folder.glob(".out.partial/model-*.safetensors")):
                    break
                time.sleep(0.001)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                hit += 1
        if process.wait() == 0:
            assert files(folder / "out") == files(folder / "whole")
            if hit == kills:
                return
            shutil.rmtree(folder / "out")
        else:
            assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("kills", "kept"),
    [
        pytest.param(3, "disk", marks=pytest.mark.slow),
        pytest.param(20, "disk", marks=pytest.mark.long),
        pytest.param(20, "memory", marks=pytest.mark.long),
    ],
)
def test_killed_runs_end_with_the_same_files(kills, kept, tmp_path):
    write_model(tmp_path / "in", num_hidden_layers=8)
    prune_folder(tmp_path / "in", tmp_path / "whole", windows(48, 48), recipe(reconstruct=True, distil={"passes": 1}))
    kill_until_done(tmp_path, kills, kept, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]
