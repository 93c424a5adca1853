"""Shared by the recipes: arguments, a trained MiniLM classifier with its reviews, a Trainer, one line of report."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from secateur.jobs.demo import LENGTH, Settings, demo_rows, dense_model
from secateur.jobs.text_classifier import evaluate
from secateur.scores import Score
from secateur.torch.data.text_rows import Batches, encode, load_tokenizer
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model


@dataclass(frozen=True)
class Reviews:
    """Training rows, calibration batches from them, and test batches that share no review with them."""

    train: list[dict[str, Any]]
    calibration: Batches
    test: Batches
    tokenizer: Any

    def training_batches(self, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """One epoch, shuffled."""
        torch.manual_seed(1)
        return iter(DataLoader(self.train, size, shuffle=True, collate_fn=DataCollatorWithPadding(self.tokenizer)))


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
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    features = encode(model, tokenizer, train, LENGTH)
    held_out = encode(model, tokenizer, test.take(range(min(args.test_rows, len(test)))), LENGTH)
    data = Reviews(features, Batches(features[:512], tokenizer, 32), Batches(held_out, tokenizer, 64), tokenizer)
    report("dense", TorchHost.untraced(model), data)
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
    collator = DataCollatorWithPadding(data.tokenizer)
    return Trainer(model=model, args=options, train_dataset=data.train, data_collator=collator, callbacks=callbacks)


def report(name: str, host: Any, data: Reviews, expect: Score | None = None) -> Score:
    """Print and return the score; SystemExit when it is not the one to `expect`."""
    score = evaluate(host, data.test)
    print(f"{name:<14} accuracy {score.accuracy:.4f}  loss {score.loss:.4f}", flush=True)
    if expect is not None and score != expect:
        raise SystemExit(f"{score} is not {expect}")
    return score
