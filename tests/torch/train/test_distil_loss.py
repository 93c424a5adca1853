import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from secateur.torch.train.distil_loss import TEMPERATURE, distillation_loss
from tests import zoo


@pytest.fixture
def model():
    return zoo.bert(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3)


@pytest.fixture
def batch():
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(50, (4, 7)), "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


def test_a_model_that_equals_its_teacher_has_the_task_loss_alone(model, batch):
    loss, output = distillation_loss(model, copy.deepcopy(model), batch)
    torch.testing.assert_close(loss, output.loss)


def test_without_labels_a_model_that_equals_its_teacher_has_nothing_to_learn(model, batch):
    loss, output = distillation_loss(model, copy.deepcopy(model), batch, with_labels=False)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.loss is None


def test_terms_by_hand(model, batch):
    torch.manual_seed(1)
    teacher = BertForSequenceClassification(model.config).eval()
    loss, output = distillation_loss(model, teacher, batch)
    with torch.no_grad():
        target = teacher(**batch, output_hidden_states=True)
    p = (target.logits / TEMPERATURE).softmax(-1)
    expected = (
        output.loss + TEMPERATURE**2 * (p * (p.log() - (output.logits / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
    )
    real = batch["attention_mask"].bool()
    for mine, theirs in zip(output.hidden_states[1:], target.hidden_states[1:], strict=True):
        expected = expected + (mine - theirs)[real].square().mean() / theirs[real].square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_other_widths_leave_hidden_states_out(model, batch):
    narrow = BertConfig(**{**model.config.to_dict(), "hidden_size": 8, "intermediate_size": 16})
    loss, output = distillation_loss(model, BertForSequenceClassification(narrow).eval(), batch)
    assert loss.item() >= output.loss.item()
    assert loss.isfinite()
