"""The squares of the gradients of `Task.fisher_loss` are the curvature of `Task.divergence`."""

from types import SimpleNamespace

import pytest
import torch

from secateur.tasks.base.classification import Classification
from secateur.tasks.base.task import Task
from secateur.tasks.given import given


class Plain(Task):
    """Classes at several positions of an example."""

    def __init__(self, places=None):
        self.places = places

    encode = collate = metrics = shown = None

    def positions(self, output, batch):
        return super().positions(output, batch) if self.places is None else [(output.logits, self.places)]


Plain.__abstractmethods__ = frozenset()


class OfKind(Plain, Classification):
    """A classification of one kind."""

    kind = None

    def __init__(self, kind):
        super().__init__()
        type(self).kind = kind


OfKind.__abstractmethods__ = frozenset()


def hessian(task, logits, batch):
    """Of the summed divergence, at the dense model: (numbers, numbers)."""

    def distance(own):
        made = SimpleNamespace(logits=own.reshape(logits.shape))
        return task.divergence(made, SimpleNamespace(logits=logits), batch).sum()

    return torch.autograd.functional.hessian(distance, logits.reshape(-1).clone())


def expected_square(task, logits, batch, draws, output=lambda own: SimpleNamespace(logits=own)):
    """Mean of s s^T over draws, (numbers, numbers)."""
    generator, total = torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        own = logits.clone().requires_grad_()
        (slope,) = torch.autograd.grad(task.fisher_loss(output(own), batch, generator), own)
        total = total + torch.outer(slope.reshape(-1), slope.reshape(-1))
    return total / draws


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_classes_are_exact_in_a_single_draw():
    logits, batch = numbers(1, 2), {"x": torch.zeros(1, 1)}
    torch.testing.assert_close(expected_square(Plain(), logits, batch, 1), hessian(Plain(), logits, batch))


@pytest.mark.parametrize("classes", [2, 3])
def test_drawn_labels_average_to_the_curvature_of_several_positions(classes):
    """Two positions of one example, three of another: the divergence is a mean over each one's positions."""
    task, batch = Plain(torch.tensor([0, 0, 1, 1, 1])), {"x": torch.zeros(2, 1)}
    logits = numbers(5, classes)
    found = expected_square(task, logits, batch, 8000)
    torch.testing.assert_close(found, hessian(task, logits, batch), atol=0.012, rtol=0)


@pytest.mark.parametrize("kind", ["classes", "labels", "number"])
def test_each_kind_of_classification_has_the_curvature_of_its_own_divergence(kind):
    task, batch = OfKind(kind), {"x": torch.zeros(2, 1)}
    logits = numbers(2, 1) if kind == "number" else numbers(2, 3)
    found = expected_square(task, logits, batch, 8000)
    torch.testing.assert_close(found, hessian(task, logits, batch), atol=0.03 if kind != "number" else 0.1, rtol=0)


def test_a_task_that_a_user_gives_has_the_curvature_of_the_relative_distance():
    task = given(loss=lambda model, batch: None, metric=lambda output, batch: None)
    wanted = numbers(2, 3)
    own = wanted.clone()
    curvature = torch.autograd.functional.hessian(
        lambda x: task.divergence((x.reshape(2, 3),), (wanted,), {}).sum(), own.reshape(-1)
    )
    found = expected_square(task, wanted, {}, 8000, output=lambda x: (x,))
    torch.testing.assert_close(found, curvature, atol=0.06 * float(curvature.max()), rtol=0)


def test_equal_seeds_draw_equal_labels():
    logits = numbers(40, 7)
    losses = [
        float(Plain().fisher_loss(SimpleNamespace(logits=logits), {}, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
