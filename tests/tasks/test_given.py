"""given: a plain module pruned, healed and measured by a loss and a metric that the user writes."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.errors import DataError, ModelError
from secateur.jobs.prune_model import Data, Stage, Tuning, run
from secateur.tasks import Reference, compare, given
from secateur.training.fine_tune import fine_tune


class Blocks(nn.Module):
    """A feed-forward network over two inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, left, right):
        return self.out(self.down(torch.relu(self.up(torch.cat([left, right], -1)))))


def rule(left, right):
    """The class that is to be learned."""
    return (left.sum(-1) > 0).long() + (right.sum(-1) > 0).long()


def batches(sizes=(16, 16, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        left, right = torch.randn(2, size, 3, generator=generator)
        made.append((left, right, rule(left, right)))
    return made


def loss(model, batch):
    left, right, y = batch
    return nn.functional.cross_entropy(model(left, right), y)


def right(outputs, batch):
    return outputs.argmax(-1) == batch[-1]


@pytest.fixture
def task():
    return given(loss=loss, metric=right, name="accuracy")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Blocks().eval()


def test_values_are_those_of_the_two_functions(model, task):
    rows = batches()
    found = task.evaluate(model, task.batches(rows), model)
    with torch.no_grad():
        answers = torch.cat([model(left, right).argmax(-1) == y for left, right, y in rows]).numpy()
        losses = [float(loss(model, batch)) * len(batch[2]) for batch in rows]
    assert found.values == {"accuracy": pytest.approx(answers.mean())}
    assert found.predictions == answers.tolist()
    assert found.loss == pytest.approx(sum(losses) / 39)
    assert (found.rows, found.kl, found.flips, found.is_against_dense) == (39, 0, None, False)


def test_the_direction_of_a_metric(model):
    """A pruned model with a larger error is worse."""
    rows = batches()

    def error(outputs, batch):
        return (outputs - 1).square().mean(-1)

    task = given(loss=loss, metric=error, higher_is_better=False, name="error")
    other = Blocks().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    made = task.batches(rows)
    reference = Reference(task, model, made)
    drop = compare(reference.evaluation(), task.evaluate(other, made, model))
    assert drop.drop == pytest.approx(drop.pruned - drop.dense)
    assert drop.drop > 0


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        (torch.ones(4, 6), "tensor"),
        ((torch.ones(4, 6), torch.ones(4)), "tuple"),
        ({"input": torch.ones(4, 6), "labels": torch.ones(4)}, "mapping"),
        ({"input": torch.ones(4, 6)}, "mapping"),
    ],
)
def test_both_functions_get_batches_as_they_were_made(batch, seen):
    kinds, wanted = [], set(batch) if isinstance(batch, dict) else None

    def note(batch):
        kinds.append({torch.Tensor: "tensor", tuple: "tuple", dict: "mapping"}[type(batch)])
        if isinstance(batch, dict):
            assert set(batch) == wanted
        return batch["input"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch

    task = given(loss=lambda m, b: m(note(b)).mean(), metric=lambda o, b: note(b).sum(-1) + 0 * o[:, 0])
    found = task.evaluate(nn.Linear(6, 2), task.batches([batch]))
    assert kinds == [seen, seen]
    assert found.value == 6


@pytest.mark.parametrize(
    ("metric", "rows", "sentence"),
    [
        (right, [], "there are no batches"),
        (right, torch.ones(4, 6), "pass a list of batches, not one Tensor"),
        (right, [(torch.ones(4, 6),)], "not a tuple of 1"),
        (right, [3], "not a int"),
        (lambda outputs, batch: 0.5, None, "numbers of shape () for a batch of 16 rows"),
        (lambda outputs, batch: outputs, None, "numbers of shape (16, 3) for a batch of 16 rows"),
    ],
)
def test_bad_batches_and_metrics(metric, rows, sentence, model):
    task = given(loss=loss, metric=metric)
    with pytest.raises(DataError, match=re.escape(sentence)):
        task.evaluate(model, task.batches(batches() if rows is None else rows))


def test_nan_is_no_number(model):
    task = given(loss=loss, metric=lambda outputs, batch: outputs[:, 0] * float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        task.evaluate(model, task.batches(batches()))


def test_batches_are_joined_where_they_fit(task):
    rows = batches()
    examples = task.encode(rows)
    joined = task.collate(examples.features[:2])
    assert torch.equal(joined["1"], torch.cat([rows[0][1], rows[1][1]]))
    assert torch.equal(joined["labels"], torch.cat([rows[0][2], rows[1][2]]))
    ragged = task.encode([(torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 4), torch.ones(2))]).features
    with pytest.raises(DataError, match="batch_size=1"):
        task.collate(ragged)
    with pytest.raises(DataError, match="leave out batch_size"):
        task.batches(rows, 32)


@pytest.mark.parametrize("distil", [False, True])
def test_a_plain_module_is_trained_pruned_healed_saved_and_reloaded(distil, task, tmp_path):
    torch.manual_seed(0)
    model = Blocks()
    train, test = batches([32] * 20), batches([40] * 3, seed=1)
    host = secateur.open(model, train[0][:2], loss=task.loss)
    before = task.evaluate(host, task.batches(test))
    fine_tune(host, task, task.encode(train), epochs=5, learning_rate=1e-2, batch_size=1, progress=False)
    trained = task.evaluate(host, task.batches(test))
    assert trained.loss < 0.6 * before.loss
    data = Data(task, task.encode(train), task.batches(train[:4]), task.batches(test), batch_size=1)
    stage = Stage(secateur.criteria.taylor, secateur.Unit("dense"), secateur.Uniform(0.5))
    tuning = Tuning(epochs=3, learning_rate=1e-2, distil=distil)
    outcome = run("small", host, [stage], data, tuning, tmp_path / "small")
    assert (outcome.drop.metric, outcome.drop.rows, outcome.reload_difference) == ("accuracy", 120, 0)
    assert outcome.tuned.loss < outcome.pruned.loss
    assert outcome.tuned.kl < outcome.pruned.kl
    small = secateur.load(tmp_path / "small", Blocks()).eval()
    assert small.up.out_features == 16
    assert task.evaluate(small, task.batches(test)).values == outcome.tuned.values
    assert model.up.out_features == 32


def test_a_module_with_several_outputs(model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 2)

        def forward(self, x):
            return self.body(x), x.sum(-1), "a word"

    torch.manual_seed(0)
    first, second = Two(), Two()
    task = given(loss=lambda m, x: m(x)[0].mean(), metric=lambda outputs, x: outputs[1])
    rows = [torch.randn(5, 6)]
    found = task.evaluate(second, task.batches(rows), first)
    with torch.no_grad():
        own, wanted = second(rows[0])[0], first(rows[0])[0]
    apart = ((own - wanted).square().sum(1) / wanted.square().sum(1)).mean() / 2
    assert found.kl == pytest.approx(float(apart), rel=1e-5)
    assert found.value == pytest.approx(float(rows[0].sum(-1).mean()), abs=1e-6)
    assert np.isfinite(found.loss)
