"""token-classification: a tag for each word of a text, such as whether it names a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from secateur.data.columns import Column, choose
from secateur.data.table import Table
from secateur.errors import DataError, shown
from secateur.metrics.entities import ENTITIES, OUTSIDE, TOKEN_ACCURACY, names_entities, spans
from secateur.metrics.metric import Metric
from secateur.tasks.base.labels import LabelMap, head_for, sorted_labels
from secateur.tasks.base.offsets import beside, need_offsets
from secateur.tasks.base.task import Examples, Options, Task
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.text_rows import padded, token_ids

WORDS = Column("text", "--text-column", ("tokens", "words", "text", "sentence"))
TAGS = Column(
    "label", "--label-column", ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "label"), is_needed=False
)


class Tags(list[str]):
    """The tags of the words of a row, as a list.

    words: the words. probabilities: of each tag; 0 for a word that the model did not see.
    """

    def __init__(self, tags: Iterable[str], words: Sequence[str], probabilities: Sequence[float]) -> None:
        super().__init__(tags)
        self.words, self.probabilities = words, probabilities


class TokenClassification(Task):
    """A tag for each word of a text; the first token of a word decides."""

    name = "token-classification"
    auto_classes = ("TokenClassification",)
    columns = (WORDS, TAGS)

    def __init__(self, model: torch.nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        self._unseen = ("", 0)
        """The note on words that the model does not see, and how many there are."""

    @classmethod
    def new_head(cls, table: Table, options: Options) -> dict[str, Any]:
        """A class for each tag: in the order of the data where it has one, else sorted, with O first."""
        names = choose(table, cls.columns, options.columns).names.get("label")
        if names is None:
            raise DataError(f"a new head needs tags; name their column with {TAGS.option}")
        name = _one(names, TAGS)
        tags = [tag for row in range(len(table)) for tag in _parts(table, name, row)]
        return head_for(tags, options.label_names or table.class_names.get(name) or sorted_labels(tags, first=OUTSIDE))

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def encode(self, table: Table) -> Examples:
        """One feature a row: its tokens, which of them are the first of a word, and the tags of these as labels.

        Words that --max-length cuts off, and those without a token, have no part in the loss.
        """
        need_offsets(self.processor, self.name)
        chosen = self.choose(table).names
        column = _one(chosen["text"], WORDS)
        words = [[str(word) for word in _parts(table, column, row)] for row in range(len(table))]
        labels = self._labels(table, _one(chosen["label"], TAGS), words) if "label" in chosen else None
        inputs = [[f" {word}" if i else word for i, word in enumerate(row)] for row in words]
        encoded = token_ids(
            self.model,
            self.processor,
            inputs if _joins_words(self.processor) else words,
            self.options.max_length,
            is_split_into_words=True,
        )
        features = []
        for row in range(len(table)):
            feature = {key: encoded[key][row] for key in encoded}
            owners = encoded.word_ids(row)
            starts = [i for i, owner in enumerate(owners) if owner is not None and (not i or owner != owners[i - 1])]
            if not starts:
                raise DataError(f"{table.where(row)}: no word of column {column!r} gives a token; remove the row")
            feature |= {"_words": words[row], "_starts": starts, "_owners": [owners[i] for i in starts]}
            if labels is not None:
                feature["labels"] = [IGNORED] * len(owners)
                for i in starts:
                    feature["labels"][i] = labels[row][owners[i]]
            features.append(feature)
        self._note_unseen([len(feature["_words"]) - len(feature["_owners"]) for feature in features])
        names = self.config.id2label
        references = None if labels is None else [[names[number] for number in row] for row in labels]
        return Examples(features, range(len(table)), references, len(table), [" ".join(row) for row in words])

    def _labels(self, table: Table, name: str, words: Sequence[Sequence[str]]) -> list[list[int]]:
        """The class numbers of the words of each row."""
        cells = [_parts(table, name, row) for row in range(len(table))]
        labels = LabelMap(self.config, self.options.label_names, self.notes)
        labels.prepare([tag for row in cells for tag in row], table.class_names.get(name), first=OUTSIDE)
        found = []
        for row, tags in enumerate(cells):
            if len(tags) != len(words[row]):
                raise DataError(
                    f"{table.where(row)}: {len(tags)} tags in column {name!r} for {len(words[row])} words; each word "
                    "needs one"
                )
            found.append([labels.id(table, name, row, tag) for tag in tags])
        return found

    def _note_unseen(self, missing: Sequence[int]) -> None:
        """Say how many words the model does not see; of all data that was encoded, in one sentence."""
        if not any(missing):
            return
        before, count = self._unseen
        count += sum(missing)
        sentence = (
            f"words that --max-length {self.options.max_length} cuts off, or that give no token: {count}; their tag is "
            f"taken to be {OUTSIDE}"
        )
        self.notes[:] = [note for note in self.notes if note != before] + [sentence]
        self._unseen = (sentence, count)

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded; `_starts` marks the first token of each word."""
        batch = padded(self.processor, features, pad_to)
        length = batch["input_ids"].shape[1]
        marks = [np.zeros(len(feature["input_ids"]), bool) for feature in features]
        for mark, feature in zip(marks, features, strict=True):
            mark[feature["_starts"]] = True
        batch["_starts"] = beside(self.processor, [mark.tolist() for mark in marks], length, padding=False)
        if all("labels" in feature for feature in features):
            batch["labels"] = beside(self.processor, [f["labels"] for f in features], length, padding=IGNORED)
        return batch

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first token of each word."""
        where = batch["_starts"].nonzero()
        return [(output.logits[where[:, 0], where[:, 1]], where[:, 0])]

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The most likely tag of each word."""
        return {"labels": output.logits.argmax(-1).masked_fill(~batch["_starts"], IGNORED)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def read(self, model: torch.nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """For each word that the model saw its most likely class and how likely it is: (words, 2)."""
        best = output.logits.float().softmax(-1).max(-1)
        both = torch.stack([best.indices.float(), best.values], -1)
        return [own[marks].cpu().numpy() for own, marks in zip(both, batch["_starts"], strict=True)]

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Tags:
        """The tags of a row; a word that the model did not see is outside of all entities."""
        words = features[0]["_words"]
        tags, probabilities = [OUTSIDE] * len(words), [0.0] * len(words)
        for owner, (number, probability) in zip(features[0]["_owners"], parts[0], strict=True):
            tags[owner], probabilities[owner] = self.config.id2label[int(number)], float(probability)
        return Tags(tags, words, probabilities)

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """Entity F1, precision, recall and accuracy; accuracy alone for tags that mark no entities."""
        return ENTITIES if names_entities(self.config.id2label.values()) else (TOKEN_ACCURACY,)

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The entities with their words (start, end exclusive); or for tags that mark none the tag of each word."""
        if not names_entities(self.config.id2label.values()):
            return {"tags": [list(pair) for pair in zip(prediction.words, prediction, strict=True)]}
        return {
            "entities": [
                {
                    "type": span.kind,
                    "text": " ".join(prediction.words[span.start : span.end]),
                    "start": span.start,
                    "end": span.end,
                    "probability": float(np.mean(prediction.probabilities[span.start : span.end])),
                }
                for span in spans(prediction)
            ]
        }


def _one(names: Sequence[str], column: Column) -> str:
    if len(names) != 1:
        raise DataError(f"{column.option} names {len(names)} columns; this task reads one")
    return names[0]


def _parts(table: Table, name: str, row: int) -> list[Any]:
    """The words or tags of a cell: a list, or a text that is split on blanks; DataError when there are none."""
    cell = table.column(name)[row]
    parts = cell.split() if isinstance(cell, str) else cell.tolist() if isinstance(cell, np.ndarray) else cell
    if parts is None or (isinstance(parts, list | tuple) and not len(parts)):
        raise DataError(f"{table.where(row)}: column {name!r} is empty; fill it or remove the row")
    if not isinstance(parts, list | tuple):
        raise DataError(f"{table.where(row)}: {shown(cell, 60)} in column {name!r} is no list and no text")
    wrong = next((part for part in parts if not isinstance(part, str | int | float)), parts)
    if wrong is not parts:
        raise DataError(f"{table.where(row)}: {shown(wrong, 60)} in the list of column {name!r} is no word")
    return list(parts)


def _joins_words(tokenizer: Any) -> bool:
    """Whether words of a list need a blank before them to be read as in a running text (BPE of bytes)."""

    def of_words(*words: str) -> Any:
        return tokenizer(list(words), is_split_into_words=True, add_special_tokens=False)["input_ids"]

    running = tokenizer("a a", add_special_tokens=False)["input_ids"]
    return of_words("a", "a") != running == of_words("a", " a")
