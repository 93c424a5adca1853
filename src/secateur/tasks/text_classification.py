"""text-classification: a text, or a pair of texts, to a class, to several labels, or to a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.data.columns import Column, texts
from secateur.data.table import Table
from secateur.errors import DataError
from secateur.tasks.base.classification import LABEL, Classification
from secateur.tasks.base.task import Examples
from secateur.torch.data.text_rows import padded, token_ids

TEXT = Column(
    "text",
    "--text-column",
    (
        "text",
        "sentence",
        "premise,hypothesis",
        "sentence1,sentence2",
        "question1,question2",
        "text1,text2",
        "question,sentence",
        "review",
        "content",
    ),
)


class TextClassification(Classification):
    """A text, or a pair of texts, to a class, to several labels, or to a number."""

    name = "text-classification"
    auto_classes = ("SequenceClassification",)
    columns = (TEXT, LABEL)

    def encode(self, table: Table) -> Examples:
        """One feature a row."""
        chosen = self.choose(table).names
        columns = [texts(table, name) for name in chosen["text"]]
        if len(columns) > 2:
            raise DataError(f"--text-column names {len(columns)} columns; a model reads one text or a pair")
        second = columns[1] if len(columns) > 1 else None
        encoded = token_ids(self.model, self.processor, columns[0], self.options.max_length, pairs=second)
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(table))]
        references = self.put_labels(features, table, chosen.get("label"))
        inputs = [" | ".join(parts) for parts in zip(*columns, strict=True)]
        return Examples(features, range(len(table)), references, len(table), inputs)

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded."""
        return self.with_labels(padded(self.processor, features, pad_to), features)
