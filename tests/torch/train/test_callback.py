"""The Trainer callback: after 200 AdamW steps the zeros are exactly the planned set."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import secateur
from secateur import Element, Hold, Unit, criteria, schedule
from secateur.plan import resized_masks
from secateur.torch.train.callback import Bar
from tests import zoo


def rows(count=64):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, zoo.VOCAB, (count, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] > 25)} for row in ids]


def train(host, plan, folder, **options):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=200,
        learning_rate=1e-3,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        per_device_train_batch_size=4,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=host.model, args=arguments, train_dataset=rows(), callbacks=[Hold(host, plan)])
    trainer.train()
    return trainer


def zeros_are_exactly(host, plan):
    for name, mask in plan.masks.items():
        np.testing.assert_array_equal((host.read(name) != 0).numpy(), mask, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["element", "units", "both"])
def test_zeros_after_200_steps(what, tmp_path):
    host = secateur.open(zoo.bert(num_hidden_layers=2))
    plan = secateur.prune(host, criteria.magnitude, Element(), 0.6)
    units = secateur.prune(host, criteria.magnitude, Unit("head", "ffn"), 0.5)
    if what == "units":
        train(host, units, tmp_path)
        for name in host.layout.params:
            mask = units.mask(host.layout, name)
            if mask is not None:
                assert not host.read(name).numpy()[~mask].any()
                assert host.read(name).numpy()[mask].all()
        return
    if what == "both":
        both = units.merge(plan)
        small = resized_masks(host.layout, both)
        host.resize(both)
        plan = small
        zeros_are_exactly(host, plan)
    train(host, plan, tmp_path)
    zeros_are_exactly(host, plan)
    assert len(plan.masks) == 12


@pytest.mark.slow
def test_masks_follow_renumbered_layers():
    host = secateur.open(zoo.bert(num_hidden_layers=3))
    element = secateur.prune(host, criteria.magnitude, Element(), 0.6)
    plan = element.merge(secateur.Plan(keep={"layers": np.array([0, 2]), "L2.ffn": np.arange(0, 48, 2)}))
    small = resized_masks(host.layout, plan)
    host.resize(plan)
    assert len(small.masks) == 12
    zeros_are_exactly(host, small.check(host.layout))


@pytest.mark.slow
def test_an_exception_in_training_leaves_nothing_held():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
    from transformers import TrainerCallback

    from secateur.tasks import Examples
    from secateur.tasks.text_classification import TextClassification
    from secateur.torch.train.callback import Gradual
    from secateur.training.fine_tune import fine_tune

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            assert len(hooks) == before + 1
            raise KeyError

    before = len(hooks)
    host = secateur.open(zoo.bert(num_hidden_layers=1))
    gradual = Gradual(
        host, lambda s: secateur.prune(host, criteria.magnitude, Element(), s), schedule.constant(0.5), every=1
    )
    task = TextClassification(host.model, Padding())
    features = list(rows(8))
    examples = Examples(features, range(len(features)), [f["labels"] for f in features], len(features))
    with pytest.raises(KeyError):
        fine_tune(host, task, examples, callbacks=[gradual, Stop()], progress=False, batch_size=4)
    assert len(hooks) == before


class Padding:
    """As much of a tokenizer as rows of equal length need."""

    model_input_names = ("input_ids", "attention_mask")

    def pad(self, features, **options):
        return {key: torch.stack([torch.as_tensor(f[key]) for f in features]) for key in features[0]}


def test_a_bar_counts_the_steps_that_are_done_and_ends_with_the_training():
    seen, ended = [], []

    def track(items, description):
        try:
            for item in items:
                yield item
                seen.append((description, item))
        finally:
            ended.append(True)

    bar, state = Bar(track), SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=4)
    bar.on_train_begin(None, state, None)
    for _ in range(2):
        bar.on_step_end(None, state, None)
    assert seen == [("training", 1), ("training", 2)]
    assert not ended
    bar.on_train_end(None, state, None)
    bar.close()
    assert ended == [True]


def test_other_processes_have_no_bar():
    bar = Bar(lambda items, description: pytest.fail("a bar"))
    bar.on_train_begin(None, SimpleNamespace(is_world_process_zero=False, global_step=0, max_steps=4), None)
    bar.on_step_end(None, None, None)
    bar.close()
