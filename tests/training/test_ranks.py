"""Two processes of torchrun train one model: zeros on both, equal weights, and the result of one process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from secateur.training import ranks
from tests.text_models import sentences, write_classifier, write_csv

SCRIPT = """
import os, sys, torch
from safetensors.torch import save_file
from secateur.cli import main
from secateur.jobs import prune_model
from secateur.training import fine_tune as train
real = train.fine_tune
held = []

def fine_tune(host, *arguments, **options):
    loss = real(host, *arguments, **options)
    state = {{name: p.detach().clone() for name, p in host.model.named_parameters()}}
    save_file(state, "{place}/rank-" + os.environ.get("RANK", "0") + ".safetensors")
    return loss

prune_model.fine_tune = train.fine_tune = fine_tune
before = torch.nn.utils.clip_grad_norm_

def clip(parameters, *arguments, **options):
    parameters = list(parameters)
    pruned = [p for p in parameters if p.dim() > 1 and p.grad is not None and (p == 0).float().mean() > 0.4]
    held.extend(bool((p.grad[p == 0] == 0).all()) for p in pruned)
    return before(parameters, *arguments, **options)

torch.nn.utils.clip_grad_norm_ = clip
try:
    main()
finally:
    with open("{place}/held-" + os.environ.get("RANK", "0"), "w") as file:
        file.write(str(bool(held) and all(held)))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this build of PyTorch has no gloo, by which processes on CPUs talk",
    ),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_classifier(folder, layers=1, initializer_range=0.05, **still)
    write_csv(folder.parent / "rows.csv", sentences(160))
    return folder


def run(place, processes, *arguments):
    """Run the command line in one process or several; what it wrote on standard output and error."""
    place.mkdir(exist_ok=True)
    script = place / "script.py"
    script.write_text(SCRIPT.format(place=place))
    start = [sys.executable, str(script)]
    if processes > 1:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(script),
        ]
    done = subprocess.run(
        [*start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done


def weights(place):
    return load_file(place / "rank-0.safetensors")


def tolerance(name):
    """The bias of the keys has no gradient but rounding, which Adam takes for one."""
    return 1e-3 if name.endswith("key.bias") else 1e-5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--sparsity", "0.5"], id="zeros"),
        pytest.param(["--criterion", "taylor", "--pattern", "head,ffn", "--sparsity", "0.5"], id="units"),
        pytest.param(["--sparsity", "0.6", "--gradual"], id="gradual", marks=pytest.mark.long),
    ],
)
def test_two_processes_prune_and_train_as_one(dense, tmp_path, options):
    data = [
        "prune",
        dense,
        "--data",
        dense.parent / "rows.csv",
        *options,
        "--fine-tune",
        "2",
        "--learning-rate",
        "1e-3",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    first = run(one, 1, *data, "--batch-size", "8", "--output", one / "out", "--json")
    assert first.returncode == 0, first.stderr
    second = run(two, 2, *data, "--batch-size", "4", "--output", two / "out", "--json")
    assert second.returncode == 0, second.stderr
    outcome = json.loads(second.stdout)  # only the first process prints
    alone, ranked, other = weights(one), weights(two), load_file(two / "rank-1.safetensors")
    assert list(ranked) == list(alone)
    for name, weight in ranked.items():
        np.testing.assert_array_equal(weight, other[name], err_msg=name)
        np.testing.assert_array_equal(weight == 0, alone[name] == 0, err_msg=name)
        np.testing.assert_allclose(weight, alone[name], atol=tolerance(name), rtol=0, err_msg=name)
    saved = json.loads(first.stdout)
    assert outcome["nonzero"] == saved["nonzero"]
    assert outcome["stages"]["tuned"]["values"] == saved["stages"]["tuned"]["values"]
    moved = load_file(dense / "model.safetensors")
    assert any(moved[n].shape != w.shape or np.abs(moved[n] - w).max() > 1e-3 for n, w in ranked.items())
    if "--pattern" not in options:
        assert [(two / f"held-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert sorted(p.name for p in two.iterdir() if p.name.startswith((".out", "out"))) == ["out"]


def test_two_processes_train_as_one_and_go_on_from_a_checkpoint(dense, tmp_path):
    (tmp_path / "two").mkdir()
    args = tmp_path / "args.yaml"
    args.write_text(f"output_dir: {tmp_path}/checkpoints\nsave_strategy: steps\nsave_steps: 10\n")
    data = ["train", dense, "--data", dense.parent / "rows.csv", "--learning-rate", "1e-3", "--epochs", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    first = run(one, 1, *data, "--batch-size", "8", "--output", one / "out")
    assert first.returncode == 0, first.stderr
    more = [*data, "--batch-size", "4", "--train-args", args]
    second = run(two, 2, *more, "--output", two / "out")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("trained on 160 rows") == 1
    alone, ranked, other = weights(one), weights(two), load_file(two / "rank-1.safetensors")
    for name, weight in ranked.items():
        np.testing.assert_array_equal(weight, other[name], err_msg=name)
        np.testing.assert_allclose(weight, alone[name], atol=tolerance(name), rtol=0, err_msg=name)
    again = run(two, 2, *more, "--output", two / "again")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("training goes on from") == 1
    for name, weight in weights(two).items():
        np.testing.assert_array_equal(weight, ranked[name], err_msg=name)


def test_an_error_under_torchrun_is_one_sentence_of_the_first_process(dense, tmp_path):
    (tmp_path / "out").mkdir()
    done = run(tmp_path, 2, "train", dense, "--data", dense.parent / "rows.csv", "--output", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("out exists; choose another output") == 1
    assert not (tmp_path / "rank-1.safetensors").exists()


def test_without_torchrun_there_is_one_process(monkeypatch):
    assert (ranks.count(), ranks.own(), ranks.is_first()) == (1, 0, True)
    value = object()
    with ranks.together():
        assert ranks.shared(value) is value
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, text)
    assert (ranks.count(), ranks.own(), ranks.is_first()) == (2, 1, False)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip()
