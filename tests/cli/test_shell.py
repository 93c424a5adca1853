"""The first screen, the order of the help, what the shell completes, and what `secateur doctor` finds."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import typer

from secateur import criteria
from secateur.cli import app, doctor
from secateur.cli.pruning.choice import find_criterion
from secateur.cli.shell import complete, welcome
from secateur.jobs import doctor as job
from secateur.select import parse_pattern

COMMANDS = typer.main.get_command(app).commands


def test_the_first_screen_is_short_and_its_lines_are_commands(call):
    done = call()
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 80
    for _, line in welcome.LINES:
        program, name, *words = shlex.split(line)
        assert program == "secateur"
        assert f"  {line}" in lines
        COMMANDS[name].make_context(name, words)


def test_the_help_of_prune_begins_with_ten_options(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    text = call("prune", "--help").out
    panels = re.findall(r"^╭─ (.+?) ─", text, re.M)
    assert panels[:2] == ["Arguments", "Most used"]
    assert panels[-1] == "Other"
    first = text.split("╭─ ")[2]
    assert re.findall(r"^│ (--[\w-]+)", first, re.M) == [
        *("--data", "--output", "--speed-up", "--on", "--max-drop"),
        *("--target", "--criterion", "--pattern", "--sparsity", "--fine-tune"),
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_the_names_that_are_completed_are_those_of_their_owners():
    pytest.importorskip("torch")
    from secateur.deploy.jobs.bench import RUNTIMES
    from secateur.deploy.target import TARGETS
    from secateur.search.target import READERS
    from secateur.tasks.find import TASKS

    assert complete.RUNTIMES == RUNTIMES
    assert set(TARGETS) <= set(complete.FORMATS)
    assert complete.READERS == READERS
    assert list(complete.TASKS) == [task.name for task in TASKS]
    assert set(criteria.__all__) - {"threshold"} <= set(complete.CRITERIA)
    assert all(find_criterion(name) for name in complete.CRITERIA if name not in ("sparsegpt", "alps"))
    assert [str(parse_pattern(name)) for name in complete.PATTERNS] == list(complete.PATTERNS)


def test_completion_of_one_name_and_of_several():
    assert complete.one_of(("onnx", "openvino", "torch"))("o") == ["onnx", "openvino"]
    several = complete.some_of(("onnx", "openvino", "torch"))
    assert several("t") == ["torch"]
    assert several("torch,onnx,o") == ["torch,onnx,openvino"]
    assert several("x") == []


def test_the_shell_is_answered_without_torch():
    code = """
import os, sys
os.environ.update(_SECATEUR_COMPLETE="complete_bash", COMP_WORDS="secateur prune ./m --on o", COMP_CWORD="4")
sys.argv = ["secateur"]
sys.modules["torch"] = None
from secateur.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["onnx", "openvino"], done.stderr


# -- doctor -----------------------------------------------------------------------------------------------------------

LINES = [
    "numpy>=1.26",
    'torch>=2.9; extra == "torch"',
    'secateur[torch]; extra == "onnx"',
    'onnx>=1.21; extra == "onnx"',
    "gguf; extra == 'something else'",
]


def test_the_packages_of_an_extra_are_its_own_and_those_that_it_includes(monkeypatch):
    monkeypatch.setattr(job, "_version_of", {"torch": "2.8.1+cpu", "onnx": "1.21"}.get)
    torch, onnx = job.extras_of(LINES)
    assert torch == job.Extra("torch", job.PURPOSES["torch"], [job.Package("torch", "2.8.1+cpu", ">=2.9")], [])
    assert ([p.name for p in onnx.packages], onnx.missing) == (["onnx"], ["torch"])
    assert onnx.install == "pip install 'secateur[onnx]'"
    assert job.Package("torch", None, "").is_good is False
    assert job.Package("torch", "2.10", ">=2.9.0").is_good
    assert not job.Package("torch", "2.9rc1", ">=2.9.1").is_good


def test_every_extra_that_people_install_has_a_purpose():
    extras = {match[1] for line in job.requirements() if (match := re.search(r"extra == ['\"](\w+)['\"]", line))}
    if not extras:
        pytest.skip("secateur is not installed")
    assert extras - {"dev"} <= set(job.PURPOSES)


def test_doctor(call, result, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    (tmp_path / "runtime.json").write_text("1234")
    found = result("doctor")
    assert (found["cache"], found["cache_bytes"], found["cache_files"]) == (str(tmp_path), 4, 1)
    assert found["kernels"]["is_compiled"]
    assert found["kernels"]["isa"] in found["kernels"]["available"]
    assert found["problems"] == []
    printed = call("doctor").out
    assert f"kernels    compiled, run on {found['kernels']['isa']}" in printed
    for extra in found["extras"]:
        assert (extra["install"] in printed) == bool(extra["missing"])


def test_doctor_without_kernels_ends_with_exit_code_1(call, monkeypatch):
    monkeypatch.setattr(job.native, "load_native", lambda: None)
    done = call("doctor")
    assert done.code == doctor.BROKEN
    assert "problem: secateur was installed without its compiled kernels; install a C++17 compiler" in done.out
    assert json.loads(call("doctor", "--json").out)["kernels"]["isa"] == "python"


def test_doctor_names_an_instruction_set_that_is_not_there(call, monkeypatch):
    def isa():  # the kernels read SECATEUR_ISA once in a process
        raise ValueError("instruction set 'neon' is not available on this CPU; available: portable, avx2")

    monkeypatch.setattr(job.native, "isa", isa)
    done = call("doctor")
    assert done.code == doctor.BROKEN
    assert "is not available on this CPU" in done.out
    assert "unset it" in done.out
