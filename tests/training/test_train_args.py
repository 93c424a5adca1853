"""The file of --train-args: what is refused, which option wins, and a training that goes on from its checkpoint."""

import json

import pytest
import torch

from secateur import criteria
from secateur.budget import Uniform
from secateur.errors import DataError, PlanError
from secateur.jobs.open_task import look, open_host
from secateur.jobs.prune_model import Data, Stage, Tuning, gradually, run
from secateur.select import Element, Unit
from secateur.tasks import Batches, Options, read_table
from secateur.torch.open import open_folder
from secateur.training import arguments as train_arguments
from secateur.training import checkpoints
from secateur.training.fine_tune import fine_tune, training_arguments
from tests.text_models import write_classifier, write_texts


def written(tmp_path, text, name="args.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "bf16: true\nlearnin_rate: 1e-3",
            "line 2: there is no training argument 'learnin_rate'; do you mean learning_",
        ),
        ("zzz: 1", "there is no training argument 'zzz'; see TrainingArguments"),
        ("learning_rate: fast", "line 1: learning_rate cannot be 'fast'"),
        ("gradient_accumulation_steps: 1.5", "gradient_accumulation_steps cannot be 1.5"),
        ("fsdp: full_shard", "fsdp has no place here, as zeros are held on whole weights"),
        ("eval_strategy: epoch", "eval_strategy has no place here, as the model is evaluated after the training"),
        ("save_strategy: epoch", "save_strategy needs a place for the checkpoints; add output_dir"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint: true needs output_dir"),
        ("- 1", "is no file of training arguments: it holds list"),
        ("a: [1", "line 1"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, sentence):
    with pytest.raises(PlanError, match=r"args\.yaml") as caught:
        train_arguments.read(written(tmp_path, text))
    assert sentence in str(caught.value)


def test_a_json_file_is_read_and_checked(tmp_path):
    path = written(tmp_path, json.dumps({"bf16": True, "learning_rate": 1}), "args.json")
    assert train_arguments.read(path) == {"bf16": True, "learning_rate": 1}
    with pytest.raises(PlanError, match="there is no training argument 'x'"):
        train_arguments.read(written(tmp_path, '{"x": 1}', "args.json"))
    with pytest.raises(PlanError, match="is damaged"):
        train_arguments.read(written(tmp_path, "[1]", "args.json"))


def test_no_is_a_strategy_and_options_of_the_command_line_win(tmp_path):
    values = train_arguments.read(written(tmp_path, "save_strategy: no\nseed: 3\nmax_steps: 5\nnum_train_epochs: 2"))
    assert values["save_strategy"] == "no"
    said = []
    assert train_arguments.without_given(values, ["fine_tune", "batch_size"], said.append) == {
        "save_strategy": "no",
        "seed": 3,
    }
    assert sorted(said) == [
        "--fine-tune wins over max_steps of --train-args",
        "--fine-tune wins over num_train_epochs of --train-args",
    ]


def test_steps_follow_from_epochs_batches_and_accumulation(tmp_path):
    given = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_train_epochs": 3}
    assert training_arguments(33, given).max_steps == 27
    assert training_arguments(33, {**given, "gradient_accumulation_steps": 2}).max_steps == 15
    assert training_arguments(33, {**given, "max_steps": 7}).max_steps == 7
    assert training_arguments(33, {**given, "num_train_epochs": 20}).warmup_steps == 11
    assert training_arguments(33, {**given, "warmup_steps": 2}).warmup_steps == 2
    with pytest.raises(DataError, match="transformers refuses these training arguments: .*cosinus"):
        training_arguments(33, {**given, "lr_scheduler_type": "cosinus"})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("dense") / "dense", layers=1)


@pytest.fixture
def job(dense, tmp_path):
    host, task = open_host(look(str(dense), None), Options(max_length=16))
    table = read_table(write_texts(tmp_path / "a.csv", 64))
    train = task.encode(table.take(range(48)))
    return host, Data(task, train, Batches(task, train.take(16), 8), task.batches(table.take(range(48, 64)), 8), 8)


def stop_at(monkeypatch, step):
    """Ctrl-C in the step of that number."""
    import transformers

    real, steps = transformers.Trainer.training_step, [0]

    def training_step(*arguments, **options):
        steps[0] += 1
        if steps[0] == step:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


@pytest.mark.parametrize("kind", ["zeros", "units", "gradual"])
def test_an_interrupted_training_goes_on_to_the_same_weights(job, tmp_path, monkeypatch, kind):
    host, data = job
    pattern = Unit("ffn", "head") if kind == "units" else Element()
    stage = Stage(criteria.magnitude, pattern, Uniform(0.5))

    def arguments(name):
        return {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 5}

    def tuned(name):
        torch.manual_seed(len(name))  # what is random before the training does not matter
        tuning = Tuning(3, 1e-3, gradual=kind == "gradual", arguments=arguments(name))
        run("r", host, [stage], data, tuning, tmp_path / f"{name}-out", overwrite=True)
        return {n: p.detach().clone() for n, p in open_folder(tmp_path / f"{name}-out").model.named_parameters()}

    whole = tuned("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            tuned("cut")
    assert checkpoints.last(tmp_path / "cut").name == "checkpoint-10"
    parted = tuned("cut")
    assert {n: p.shape for n, p in parted.items()} == {n: p.shape for n, p in whole.items()}
    assert all(torch.equal(p, whole[n]) for n, p in parted.items())
    if kind == "zeros":
        assert all(float((p == 0).float().mean()) >= 0.49 for n, p in parted.items() if n.endswith("query.weight"))


def test_checkpoints_of_another_training_are_refused(job, tmp_path):
    host, data = job
    arguments = {"output_dir": str(tmp_path / "c"), "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    fine_tune(host, data.task, data.train, arguments=arguments, progress=False, batch_size=8)
    with pytest.raises(DataError, match="checkpoint-3 is of another training"):
        fine_tune(host, data.task, data.train, arguments=arguments, progress=False, batch_size=8)
    begin = {**arguments, "resume_from_checkpoint": False}
    assert fine_tune(host, data.task, data.train, arguments=begin, progress=False, batch_size=8) > 0
    missing = {**arguments, "resume_from_checkpoint": str(tmp_path / "none")}
    with pytest.raises(DataError, match="is no checkpoint: it has no trainer_state.json"):
        fine_tune(host, data.task, data.train, arguments=missing, progress=False, batch_size=8)


def test_a_checkpoint_that_was_not_written_to_its_end_is_none(tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.last(tmp_path) is None
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoints.last(tmp_path / "none") is None


def test_accumulated_steps_are_those_of_larger_batches(dense, job):
    _, data = job

    def tuned(**arguments):
        host, _ = open_host(look(str(dense), None), Options(max_length=16))
        host.model.config.hidden_dropout_prob = 0.0
        for module in host.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        fine_tune(host, data.task, data.train, arguments=arguments, progress=False, learning_rate=1e-3)
        return dict(host.model.named_parameters())

    large = tuned(per_device_train_batch_size=8)
    small = tuned(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    start = dict(open_folder(dense).model.named_parameters())
    # The bias of the keys has no gradient but rounding, which Adam takes for one.
    apart = {n: float((p - large[n]).abs().max().detach()) for n, p in small.items() if not n.endswith("key.bias")}
    assert max(apart.values()) < 1e-5
    assert max(float((p - start[n]).abs().max().detach()) for n, p in large.items()) > 2e-3


def test_accumulation_and_mixed_precision_hold_zeros(job, tmp_path, capsys):
    host, data = job
    arguments = {"output_dir": str(tmp_path), "gradient_accumulation_steps": 3, "bf16": True, "use_cpu": True}
    stage = Stage(criteria.magnitude, Element(), Uniform(0.5))
    outcome = run("r", host, [stage], data, Tuning(1, 1e-3, arguments=arguments), tmp_path / "out")
    assert capsys.readouterr().out == ""  # the Trainer prints nothing
    assert outcome.total - outcome.nonzero == outcome.provenance["steps"][-1]["counted"]["weights"] // 2
    assert outcome.tuned.values != outcome.pruned.values or outcome.tuned.loss != outcome.pruned.loss
    assert gradually(host, [stage], Tuning(3, arguments=arguments), data)._every == 1


def test_a_package_that_is_missing_is_named(job, monkeypatch):
    host, data = job
    with pytest.raises(DataError, match="need a package that is missing: .*comet"):
        fine_tune(host, data.task, data.train, arguments={"report_to": ["comet_ml"]}, progress=False)


def test_a_checkpoint_that_is_named_is_taken_from_any_training(job, tmp_path):
    host, data = job
    how = {"progress": False, "batch_size": 8}
    first = {"output_dir": str(tmp_path / "c"), "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    fine_tune(host, data.task, data.train, arguments=first, **how)
    tuned = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    other = open_folder(tmp_path / "c" / "checkpoint-3")  # a checkpoint is a model folder
    assert all(torch.equal(p, tuned[n]) for n, p in other.model.named_parameters())
    with torch.no_grad():
        next(host.model.parameters()).zero_()
    named = {"resume_from_checkpoint": str(tmp_path / "c" / "checkpoint-3"), "max_steps": 3}
    fine_tune(host, data.task, data.train, arguments=named, **how)
    assert all(torch.equal(p, tuned[n]) for n, p in host.model.named_parameters())
