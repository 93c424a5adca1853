"""The commands from end to end on a tiny classifier: what they write, and what they print."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from secateur import cli
from secateur.cli import main
from secateur.search.levels import AxisLevels, Levels
from secateur.search.stored import save

COMMANDS = ("inspect", "prune", "train", "eval", "report", "run", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(call, command):
    done = call(command, "--help")
    assert done.code == 0
    assert f"secateur {command} " in done.out
    assert "Examples:" in done.out
    lines = [line.strip() for line in done.out.splitlines()]
    first = next(module for module in cli.MODULES if command == module.NAME).EXAMPLES[0]
    assert any(line and first.startswith(line) for line in lines), "an example begins a line"
    assert done.err == ""


def test_help_imports_no_framework():
    code = """
import sys
from secateur import cli
from secateur.cli import main
for arguments in (["--help"], ["prune", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, stop.code
found = {"torch", "transformers", "datasets", "pandas", "matplotlib", "tensorflow", "keras"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(call):
    import secateur

    assert call("--version").out.strip() == secateur.__version__


def test_train_as_json(result, encoder, data, tmp_path):
    folder = tmp_path / "trained"
    found = result("train", encoder, "--data", data, "--output", folder, "--epochs", 0.1, "--max-length", 16)
    assert (found["output"], found["examples"], found["epochs"]) == (str(folder), 240, 0.1)
    assert 0 < found["loss"] < 2
    assert (folder / "config.json").exists()


def test_inspect_shows_the_levels_of_a_folder(call, result, refused, tmp_path):
    ten = AxisLevels("L0.ffn", "ffn", np.arange(4), np.array([0, 0.125, 0.5, 2, np.inf]))
    save(Levels("kfac", {"L0.ffn": ten}, {"layers": np.array([0.25])}, {"hidden": "why"}), tmp_path)
    found = result("inspect", tmp_path, "--levels")
    assert found["axes"] == [{"axis": "L0.ffn", "kind": "ffn", "size": 4, "losses": [0.125, 0.5, 2.0]}]
    assert found["layers"] == {"layers": [0.25]}
    printed = call("inspect", tmp_path / "secateur-levels.json", "--levels").out
    assert "25% gone" in printed
    assert "0.125" in printed
    assert "secateur-levels.json" in refused("inspect", tmp_path / "none", "--levels")


def test_inspect(call, result, classifier):
    from secateur.layout import Layout

    found = result("inspect", classifier)
    axes = {axis["axis"]: axis for axis in found["axes"]}
    assert (axes["L1.head"]["size"], axes["L1.ffn"]["size"], axes["L0.ffn"]["kind"]) == (4, 64, "ffn")
    assert axes["L0.ffn"]["parameters_per_unit"] == 32 + 1 + 32
    assert "L0.head .. L1.head" in call("inspect", classifier).out
    layout = Layout.from_text(call("inspect", classifier, "--layout").out)
    assert layout.axis("L1.ffn").size == 64


def test_a_layout_file_by_hand(call, result, refused, classifier, data, tmp_path, place, monkeypatch):
    from secateur.errors import ModelError
    from secateur.torch.shrink import probe

    def refuse(model, example):
        raise ModelError("it cannot be exported")

    monkeypatch.setattr(probe, "trace", refuse)
    blank = call("inspect", classifier, "--layout").out
    up, down = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"
    lines = []
    for line in blank.splitlines():
        name = line.split(" :")[0].strip()
        if name in (f"{up}.weight", f"{up}.bias", f"{down}.weight"):
            line = line.replace(" 64", " L0.ffn")
        lines.append(line)
    file = tmp_path / "by-hand.layout"
    file.write_text("\n".join(lines).replace("axes", "axes\n  L0.ffn 64 ffn", 1))
    axes = result("inspect", classifier, "--layout-file", file)["axes"]
    assert [(a["axis"], a["size"], a["parameters_per_unit"]) for a in axes] == [("L0.ffn", 64, 65)]
    options = [
        "--data",
        data,
        "--pattern",
        "ffn",
        "--sparsity",
        "0.5",
        "--layout-file",
        file,
        "--output",
        place / "small",
    ]
    file.write_text(file.read_text().partition("products\n")[0])
    assert "MACs unknown (the layout lists no products)" in call("inspect", classifier, "--layout-file", file).out
    assert result("prune", classifier, *options)["macs_ratio"] is None
    file.write_text(file.read_text().replace("L0.ffn 64", "L0.ffn 63"))
    assert "(64, 32) but the layout says (63, 32)" in refused("inspect", classifier, "--layout-file", file)
    assert "cannot be read" in refused("inspect", classifier, "--layout-file", tmp_path / "none")


@pytest.mark.parametrize(("pattern", "share"), [("element", 0.5), ("2:4", 0.5), ("4x1", 0.25), ("head,ffn", 0.5)])
def test_prune(result, classifier, data, place, pattern, share):
    from secateur.plan import Plan
    from secateur.torch.files.saving import load

    arguments = [
        "prune",
        classifier,
        "--data",
        data,
        "--pattern",
        pattern,
        "--output",
        place / "out",
        "--max-length",
        16,
    ]
    outcome = result(*arguments, *([] if pattern == "2:4" else ["--sparsity", share]))
    assert outcome["reload_difference"] == 0
    assert outcome["difference"] <= 1e-5
    assert outcome["dense"] >= 0.9
    assert outcome["rows"] == 24
    assert outcome["bytes"] == sum(f.stat().st_size for f in (place / "out").rglob("*") if f.is_file())
    assert [path.name for path in place.iterdir()] == ["out"]
    plan, model = Plan.load(place / "out"), load(place / "out")
    if pattern == "head,ffn":
        assert {name: len(units) for name, units in plan.keep.items()} == {
            "L0.head": 2, "L1.head": 2, "L0.ffn": 32, "L1.ffn": 32
        }  # fmt: skip
        assert model.get_parameter("bert.encoder.layer.0.output.dense.weight").shape == (32, 32)
        assert outcome["macs_ratio"] < 0.6
        return
    assert len(plan.masks) == 12
    for name, mask in plan.masks.items():
        zeros = (model.get_parameter(name) == 0).numpy()
        np.testing.assert_array_equal(zeros, ~mask)
        assert zeros.mean() == pytest.approx(share)


@pytest.mark.parametrize("pattern", [pytest.param("element", marks=pytest.mark.slow), "ffn"])
def test_prune_and_fine_tune(result, classifier, data, place, pattern):
    from secateur.plan import Plan
    from secateur.torch.files.saving import load

    arguments = ["--criterion", "taylor", "--pattern", pattern, "--sparsity", "0.75", "--fine-tune", "2"]
    tuned = result("prune", classifier, "--data", data, *arguments, "--output", place / "out", "--max-length", 16)
    assert tuned["pruned"] >= 0.9
    assert tuned["stages"]["tuned"]["loss"] != tuned["stages"]["pruned"]["loss"]
    model = load(place / "out")
    for name, mask in Plan.load(place / "out").masks.items():
        np.testing.assert_array_equal((model.get_parameter(name) == 0).numpy(), ~mask)


@pytest.mark.slow
def test_distil_learns_from_the_dense_model(result, classifier, data, place, monkeypatch):
    from secateur.training import fine_tune as train

    asked = []
    real = train.distillation_loss

    def watched(model, teacher, inputs, *rest, **options):
        asked.append(teacher.get_parameter("bert.encoder.layer.0.output.dense.weight").count_nonzero().item())
        return real(model, teacher, inputs, *rest, **options)

    monkeypatch.setattr(train, "distillation_loss", watched)
    arguments = ["--data", data, "--sparsity", "0.5", "--max-length", 16, "--fine-tune", "0.5"]
    alone = result("prune", classifier, *arguments, "--output", place / "alone")
    assert not asked
    taught = result("prune", classifier, *arguments, "--distil", "--output", place / "taught")
    assert set(asked) == {32 * 64}
    assert taught["stages"]["tuned"]["loss"] != alone["stages"]["tuned"]["loss"]


@pytest.mark.slow
def test_sweep(result, classifier, data, place):
    arguments = ["--data", data, "--sweep", "0.3,0.9", "--output", place / "out", "--max-length", 16]
    points = result("prune", classifier, *arguments)
    assert [round(p["sparsity"], 2) for p in points] == [0.0, 0.3, 0.9]
    assert points[0]["flips"] == 0
    assert points[1]["threshold"] < points[2]["threshold"]
    assert points[1]["kl"] < points[2]["kl"]
    assert json.loads((place / "out" / "sweep.json").read_text()) == points
    assert (place / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in (place / "out").iterdir()) == ["sweep.json", "sweep.png"]


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_check_compares_the_folder_before_it_is_opened(call, refused, copy, data, command):
    words = [command, copy, "--check", *(["--data", data] if command == "eval" else [])]
    done = call(*words)
    assert done.code == 0, done.err
    assert f"files of {copy} are those that were saved" in done.err
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert call(*words[:2], *words[3:]).code == 0
    assert refused(*words).startswith(f"{copy} has changed: model.safetensors is not the file that was saved")
    (copy / "secateur-hashes.json").unlink()
    assert "has no secateur-hashes.json" in refused(*words)


def test_check_is_for_folders(refused, data, classifier):
    assert "org/name is no folder" in refused("eval", "org/name", "--data", data, "--check")
    assert "--check has no meaning in a run on a .keras file" in refused("eval", "model.keras", "--check")


def test_eval_against(result, classifier, data):
    found = result("eval", classifier, "--data", data, "--against", classifier)
    assert (found["rows"], found["kl"], found["flips"]) == (240, 0.0, 0.0)
    assert found["values"]["accuracy"] >= 0.9
    assert (found["drop"], found["drop_interval"]) == (0.0, [0.0, 0.0])


# -- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["secateur.torch.stats.collect._backward", "transformers.Trainer.training_step"])
def test_an_interrupt_writes_nothing(refused, classifier, data, place, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    arguments = ["--criterion", "taylor", "--sparsity", "0.5", "--fine-tune", "1", "--output", place / "deep" / "out"]
    assert refused("prune", classifier, "--data", data, *arguments, code=130) == "interrupted; nothing was written"


FULL = "No space left on device; free some space, or choose another output"


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        (KeyboardInterrupt, 130, "interrupted; nothing was written"),
        (OSError(28, "No space left on device"), 2, FULL),
    ],
)
def test_a_failure_while_saving_leaves_nothing(refused, classifier, data, place, monkeypatch, wrong, code, said):
    def fail(*args, **kwargs):
        raise wrong

    monkeypatch.setattr("secateur.torch.reloaded.load_model", fail)
    arguments = ["--data", data, "--sparsity", "0.5", "--output", place / "deep" / "out"]
    assert refused("prune", classifier, *arguments, code=code) == said


def test_a_stopped_fine_tuning_goes_on_with_the_same_command(call, classifier, data, place, monkeypatch):
    import transformers

    file = place / "args.yaml"
    file.write_text(f"output_dir: {place / 'checkpoints'}\nsave_strategy: steps\nsave_steps: 4\nseed: 5\n")
    command = ["prune", classifier, "--data", data, "--sparsity", "0.5", "--fine-tune", "2", "--output", place / "out"]
    command += ["--train-args", file, "--seed", "0"]
    real, steps = transformers.Trainer.training_step, []

    def training_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    done = call(*command)
    said = " ".join(done.err.split())
    assert done.code == 130
    assert "--seed wins over seed of --train-args" in said
    assert f"interrupted; {place}/checkpoints/checkpoint-4 is kept: give the same command again to go on" in said
    assert sorted(path.name for path in place.iterdir()) == ["args.yaml", "checkpoints"]
    again = call(*command)
    assert again.code == 0, again.err
    assert len(steps) == 7 + 14 - 4  # 216 rows in batches of 32, twice


def test_training_arguments_that_are_wrong_are_refused(refused, classifier, data, place, tmp_path):
    (tmp_path / "args.yaml").write_text("bf16: false\nlearning_rat: 1")
    output = ["--output", place / "out", "--train-args", tmp_path / "args.yaml"]
    sentence = "args.yaml, line 2: there is no training argument 'learning_rat'; do you mean learning_rate?"
    assert sentence in refused("train", classifier, "--data", data, *output)
    prune = ["prune", classifier, "--data", data, "--sparsity", "0.5", *output]
    assert sentence in refused(*prune, "--fine-tune", "1")
    assert "--train-args does nothing without --fine-tune" in refused(*prune)


TRAINING = """
import os, sys, transformers
from secateur.cli import main
real = transformers.Trainer.training_step
def step(*arguments, **options):
    os.write({written}, b"x")
    return real(*arguments, **options)
transformers.Trainer.training_step = step
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_real_run(classifier, data, place, number):
    read, written = os.pipe()
    command = [sys.executable, "-c", TRAINING.format(written=written), "prune", str(classifier)]
    options = ["--data", str(data), "--sparsity", "0.5", "--fine-tune", "100000", "--output", str(place / "out")]
    run = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[written],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    os.close(written)
    started = os.read(read, 1)  # nothing where the run ends before its first step
    run.send_signal(number)
    out, err = run.communicate(timeout=120)
    os.close(read)
    assert started, err
    assert run.returncode == 130, err
    assert "error: interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert out == ""
    assert list(place.iterdir()) == []


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before
