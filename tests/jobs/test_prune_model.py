import pytest
import torch

import secateur
from secateur import criteria
from secateur.budget import Global, Uniform
from secateur.errors import ModelError, PlanError
from secateur.jobs.open_task import look, open_host
from secateur.jobs.prune_model import (
    Data,
    Stage,
    Tuning,
    compare_latency,
    reload_gap,
    run,
    save_dense,
    tensor_bytes,
)
from secateur.pruning import default_weights
from secateur.select import Element, Unit
from secateur.tasks import Batches, Options, read_table
from secateur.torch.open import open_folder, open_module
from tests.text_models import write_classifier, write_texts


@pytest.fixture
def job(tmp_path):
    folder = write_classifier(tmp_path / "dense")
    host, task = open_host(look(str(folder), None), Options(max_length=32))
    table = read_table(write_texts(tmp_path / "a.csv"))
    train = task.encode(table.take(range(96)))
    data = Data(task, train, Batches(task, train.take(32), 8), task.batches(table.take(range(96, len(table))), 8), 8)
    return host, data, tmp_path


def test_a_reload_is_compared_with_the_model_in_memory(job):
    host, data, folder = job
    save_dense(host, folder / "a", data.task)
    assert reload_gap(host, folder / "a", data.test[0]) == 0.0
    bias = host.read("classifier.bias")
    bias[0] += 1
    with pytest.raises(ModelError, match="differs from the saved one by"):
        reload_gap(host, folder / "a", data.test[0])
    bias[0] = torch.nan  # in memory and in the file
    save_dense(host, folder / "b", data.task)
    with pytest.raises(ModelError, match="gives NaN"):
        reload_gap(host, folder / "b", data.test[0])


@pytest.mark.slow
def test_gradual_and_distilled_zeros_are_packed(job):
    host, data, folder = job
    before = {name: p.clone() for name, p in host.model.named_parameters()}
    save_dense(host, folder / "reference", data.task)
    step = Stage(criteria.magnitude, Element(), Global(0.8))
    outcome = run("m", host, [step], data, Tuning(2, 1e-3, distil=True, gradual=True), folder / "out")
    linears = default_weights(host.layout)
    counted = sum(host.read(name).numel() for name in linears)
    assert outcome.total - outcome.nonzero == round(0.8 * counted)
    again = open_folder(folder / "out")
    assert sum(int((again.read(name) == 0).sum()) for name in linears) == round(0.8 * counted)
    assert outcome.linear_bytes == tensor_bytes(folder / "out", linears)
    dense_bytes = tensor_bytes(folder / "reference", linears)
    assert dense_bytes == 4 * counted
    assert 0.2 * dense_bytes < outcome.linear_bytes <= 0.40 * dense_bytes
    assert outcome.reload_difference == 0.0
    assert all(torch.equal(p, before[name]) for name, p in host.model.named_parameters())


@pytest.mark.slow
def test_units_shrink_and_a_report_says_by_how_much(job):
    host, data, folder = job
    step = Stage(criteria.fisher, Unit("head", "ffn"), Uniform(0.5))
    outcome = run("u", host, [step], data, Tuning(1, 1e-3), folder / "out")
    assert outcome.difference <= 1e-5
    assert outcome.macs_ratio < 0.7
    assert outcome.linear_bytes == tensor_bytes(folder / "out", default_weights(host.layout))
    assert outcome.linear_bytes == 2 * sum(host.read(name).numel() for name in default_weights(host.layout))
    assert outcome.tuned is not None


def test_gradual_pruning_of_what_needs_data_is_refused(job):
    host, data, folder = job
    with pytest.raises(PlanError, match="takes the criterion magnitude"):
        step = Stage(criteria.taylor, Element(), Global(0.8))
        run("t", host, [step], data, Tuning(1, gradual=True), folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_latency_is_taken_in_another_process(job):
    host, data, folder = job
    save_dense(host, folder / "reference", data.task)
    threads = torch.get_num_threads()
    seconds = compare_latency({"a": folder / "dense", "b": folder / "reference"}, (2, 5), repeats=3)
    assert set(seconds) == {"a", "b"}
    assert all(value > 0 for value in seconds.values())
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_zeros_of_an_earlier_step_are_held_counted_and_packed(job):
    host, data, folder = job
    first = run("p", host, [Stage(criteria.magnitude, Element(), Uniform(0.8))], data, Tuning(), folder / "p80")
    linears = default_weights(host.layout)
    again = open_folder(folder / "p80")
    assert sorted(again.plan.masks) == sorted(linears)
    outcome = run("s", again, [Stage(criteria.magnitude, Unit("ffn"), Uniform(0.25))], data, Tuning(1), folder / "s")
    small = open_folder(folder / "s")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(small.read(query) == 0, again.read(query) == 0)
    assert not torch.equal(small.read(query), again.read(query))
    up, kept = "bert.encoder.layer.0.intermediate.dense.weight", small.layout.shape
    assert kept(up) == (48, 32)
    zeros = sum(int((small.read(name) == 0).sum()) for name in linears)
    assert zeros > 0.75 * sum(small.read(name).numel() for name in linears)
    assert outcome.total - outcome.nonzero == zeros
    assert outcome.provenance["steps"][0]["found"] == {"tensors": 12, "zeros": first.total - first.nonzero}


@pytest.mark.slow
def test_gradual_pruning_keeps_earlier_zeros(job):
    host, data, _ = job
    host.apply(secateur.prune(host, criteria.magnitude, Element(), 0.8))
    again = open_module(host.model)
    step = Stage(criteria.magnitude, Element(), Uniform(0.1))
    outcome = run("g", again, [step], data, Tuning(1, gradual=True))
    assert outcome.total - outcome.nonzero == again.plan.provenance["found"]["zeros"]
    assert outcome.provenance["gradual"]
