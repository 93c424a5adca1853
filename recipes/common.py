"""Shared by the recipes: arguments, a trained MiniLM classifier with its reviews, a Trainer, one line of report."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from secateur.jobs.demo import Settings, demo_rows, dense_model, options_of
from secateur.jobs.open_task import look
from secateur.tasks import Batches, Evaluation, Task


@dataclass(frozen=True)
class Reviews:
    """Training rows, calibration batches from them, and test batches that share no review with them."""

    task: Task
    train: list[dict[str, Any]]
    calibration: Batches
    test: Batches

    def training_batches(self, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """One epoch, shuffled."""
        torch.manual_seed(1)
        return iter(DataLoader(self.train, size, shuffle=True, collate_fn=self.task.collate))


def arguments(description: str | None) -> argparse.Namespace:
    """Command line of a recipe."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--rows", type=int, default=4000, help="training reviews")
    parser.add_argument("--test-rows", type=int, default=1530, help="reviews to report on")
    parser.add_argument("--cache", default=".cache/secateur", help="where the trained dense model is kept")
    return parser.parse_args()


def prepared(args: argparse.Namespace) -> tuple[torch.nn.Module, Reviews]:
    """A trained dense classifier (from the cache if it is there) and its data."""
    settings = Settings(train_rows=args.rows)
    train, test = demo_rows(settings)
    folder, _ = dense_model(settings, Path(args.cache), train)
    opened = look(str(folder), None)
    model = opened.model()
    task = opened.of(model, options_of(settings))
    examples = task.encode(train)
    held_out = task.batches(test.take(range(min(args.test_rows, len(test)))), 64)
    data = Reviews(task, list(examples.features), Batches(task, examples.take(512), 32), held_out)
    report("dense", model, data)
    return model, data


def trainer(model: torch.nn.Module, data: Reviews, callbacks: list[Any] | None = None) -> Trainer:
    """An ordinary transformers Trainer: only the callbacks know of pruning."""
    options = TrainingArguments(
        output_dir=".cache/trainer",
        num_train_epochs=1,
        learning_rate=1e-4,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
    )
    return Trainer(
        model=model, args=options, train_dataset=data.train, data_collator=data.task.collate, callbacks=callbacks
    )


def report(name: str, model: Any, data: Reviews, expect: Evaluation | None = None) -> Evaluation:
    """Print and return the evaluation of a model or host; SystemExit when its numbers are not those to `expect`."""
    score = data.task.evaluate(model, data.test)
    print(f"{name:<14} accuracy {score.value:.4f}  loss {score.loss:.4f}", flush=True)
    if expect is not None and (score.value, score.loss) != (expect.value, expect.loss):
        raise SystemExit(f"{score} is not {expect}")
    return score
