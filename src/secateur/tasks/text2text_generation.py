"""text2text-generation: a text to another text, such as its translation or its summary (T5, BART, Marian)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.data.columns import Choice, Column, texts
from secateur.data.table import Table
from secateur.errors import DataError, ModelError
from secateur.metrics.metric import Metric
from secateur.metrics.texts import TEXTS
from secateur.tasks.base.task import Examples, Options, Task, at_labels
from secateur.tasks.base.tokens import batch_for, filled, longest
from secateur.torch.base.batches import IGNORED, evaluating, to_device
from secateur.torch.data.text_rows import padded, text_positions, token_ids

SOURCE = Column(
    "text",
    "--text-column",
    ("text", "source", "article", "document", "dialogue", "src", "input", "inputs", "question", "sentence"),
)
TARGET = Column(
    "target",
    "--target-column",
    ("target", "summary", "highlights", "translation", "dst", "tgt", "output", "targets", "answer"),
    is_needed=False,
)
PAIRS = "translation"
"""A column of objects with a text in each of two languages, as data sets of translations have it."""


class Text2TextGeneration(Task):
    """A text to another text: the model writes greedily, at most `Options.new_tokens` tokens.

    Where the data has no targets, losses and divergences are those of the dense model's own texts.
    """

    name = "text2text-generation"
    auto_classes = ("Seq2SeqLM",)
    columns = (SOURCE, TARGET)

    def __init__(self, model: nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        self._writer: Any = None
        self._written: dict[tuple[int, ...], list[int]] = {}

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def choose(self, table: Table) -> Choice:
        """The columns; of a column of translations its first language is the source, and its second the target."""
        if not _has_pairs(table):
            return super().choose(table)
        first, second = list(table.column(PAIRS)[0])[:2]
        named = self.options.columns
        found = {"text": (named.get("text") or first,), "target": (named.get("target") or second,)}
        sentence = f"the column {PAIRS} is read from {found['text'][0]} to {found['target'][0]}"
        self.notes += [sentence] if sentence not in self.notes else []
        return Choice(found)

    def encode(self, table: Table) -> Examples:
        """One feature a row, with the ids of the target as labels where there is one."""
        self._start()
        chosen = self.choose(table).names
        table = _unfolded(table) if _has_pairs(table) else table
        for role, names in chosen.items():
            if len(names) > 1:
                raise DataError(f"--{role}-column names {len(names)} columns; this task reads one")
        sources = texts(table, chosen["text"][0])
        encoded = token_ids(self.model, self.processor, sources, self.options.max_length)
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(table))]
        references = None
        if "target" in chosen:
            references = [text.strip() for text in texts(table, chosen["target"][0])]
            for feature, ids in zip(features, self._targets(references), strict=True):
                feature["labels"] = ids
        return Examples(features, range(len(table)), references, len(table), sources)

    def _targets(self, targets: Sequence[str]) -> list[list[int]]:
        """Target texts as token ids that end with the token that ends a text."""
        network: Any = self.model
        limit = min(self.options.max_length, text_positions(network) or self.options.max_length)
        rows = self.processor(text_target=list(targets), truncation=True, max_length=limit)["input_ids"]
        end = self.processor.eos_token_id
        rows = [ids if end is None or end in ids else [*ids[: limit - 1], end] for ids in rows]
        head = network.get_output_embeddings()
        largest = max(max(ids) for ids in rows)
        if head is not None and largest >= head.weight.shape[0]:
            raise DataError(
                f"the tokenizer gives token {largest} for a target, the model writes {head.weight.shape[0]}; they do "
                "not belong together"
            )
        return rows

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded, and the targets as labels; without targets, what the dense model wrote for the decoder."""
        batch = padded(self.processor, features, pad_to)
        if "labels" in features[0]:
            batch["labels"] = filled([feature["labels"] for feature in features], IGNORED)
            return batch
        written = self._write(features, batch)
        inputs = [[self._start(), *ids[:-1]] for ids in written]
        batch["decoder_input_ids"] = filled(inputs, self.processor.pad_token_id or 0)
        batch["decoder_attention_mask"] = filled([[1] * len(ids) for ids in inputs], 0)
        return batch

    def largest_batch(self, features: Sequence[Mapping[str, Any]]) -> int | None:
        """As many rows as their logits allow."""
        has_labels = bool(features) and "labels" in features[0]
        return batch_for(self.model, longest(features, "labels") if has_labels else self.options.new_tokens)

    def _start(self) -> int:
        """The token that starts a text of the decoder; ModelError where the model names none."""
        for config in (getattr(self.model, "generation_config", None), self.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if isinstance(getattr(config, name, None), int):
                    return int(getattr(config, name))
        raise ModelError(
            f"the config of the {type(self.model).__name__} names no decoder_start_token_id; set it and save the model "
            "again"
        )

    def _write(self, features: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the dense model writes for each row, computed once."""
        if self._writer is not self.dense:
            self._writer, self._written = self.dense, {}
        keys = [tuple(feature["input_ids"]) for feature in features]
        if any(key not in self._written for key in keys):
            for key, ids in zip(keys, self._generate(self.dense, batch), strict=True):
                self._written[key] = ids.tolist()
        return [self._written[key] for key in keys]

    # -- answers ------------------------------------------------------------------------------------------------------

    def _generate(self, model: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Greedy ids of each row after the start token, up to and with the token that ends a text."""
        batch = to_device(batch, model)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
        most = min(self.options.new_tokens, text_positions(model) or self.options.new_tokens)
        with evaluating(model), torch.no_grad():
            rows = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
        rows = rows[:, 1:].cpu().numpy()
        end = getattr(model.generation_config, "eos_token_id", None)
        ends = [end] if isinstance(end, int) else list(end or ())
        found = []
        for row in rows:
            stops = np.flatnonzero(np.isin(row, ends))
            found.append(row[: stops[0] + 1] if len(stops) else row)
        return found

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tokens of the target, or of what the dense model wrote."""
        if "labels" in batch:
            return [at_labels(output.logits, batch["labels"])]
        where = batch["decoder_attention_mask"].nonzero()
        return [(output.logits[where[:, 0], where[:, 1]], where[:, 0])]

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The most likely token at each position of what the dense model wrote."""
        return {"labels": output.logits.argmax(-1).masked_fill(batch["decoder_attention_mask"] == 0, IGNORED)}

    def read(self, model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The ids that the model writes for each row."""
        if not bool(output.logits.isfinite().all()):
            raise ModelError(
                "the model answers NaN or infinity on this data; look for NaN or huge values in its weights"
            )
        return self._generate(model, batch)

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> str:
        """The text."""
        return str(self.processor.decode(parts[0].tolist(), skip_special_tokens=True)).strip()

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """chrF, BLEU, and the share of texts that are the reference to the letter."""
        return TEXTS

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The text."""
        return {"text": prediction}


def _has_pairs(table: Table) -> bool:
    """Whether there is a column of translations, with two texts or more in each cell."""
    cells = table.columns.get(PAIRS, ())
    return bool(len(cells)) and isinstance(cells[0], Mapping) and len(cells[0]) > 1


def _unfolded(table: Table) -> Table:
    """The table with a column for each language of its translations; DataError for a cell without them."""
    cells = table.column(PAIRS)
    languages = list(cells[0])
    for row, cell in enumerate(cells):
        if not isinstance(cell, Mapping) or list(cell) != languages:
            raise DataError(f"{table.where(row)}: column {PAIRS!r} does not hold {' and '.join(languages)}")
    return replace(table, columns={name: [cell[name] for cell in cells] for name in languages})
