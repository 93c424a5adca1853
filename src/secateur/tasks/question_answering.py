"""question-answering: the words of a context that answer a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from secateur.data.answers import Gold, answers
from secateur.data.columns import Column, texts
from secateur.data.table import Table
from secateur.errors import DataError
from secateur.metrics.answers import ANSWERS
from secateur.metrics.metric import Metric
from secateur.tasks.base.offsets import beside, need_offsets
from secateur.tasks.base.task import Examples, Options, Task
from secateur.torch.data.text_rows import padded, token_ids

TEXTS = Column("text", "--text-column", ("question,context",))
ANSWER = Column("target", "--target-column", ("answers", "answer"), is_needed=False)

LONGEST = 30
"""Tokens of the longest answer that is given."""
LEAST_ROOM = 8
"""Tokens of a context that a piece must have room for, beside the question."""
NEVER = -1e4
"""A logit of tokens that cannot be an answer; finite, so that two of them differ by 0."""


class Answer(str):
    """An answer as a text, which is empty where there is none.

    start, end: where it stands in the context, in characters; 0 and 0 where there is none.
    probability: of its first and its last token, among those of its piece of the context.
    """

    start: int
    end: int
    probability: float

    def __new__(cls, context: str, start: int, end: int, probability: float) -> Answer:
        """The part of a context from `start` to `end`."""
        answer = super().__new__(cls, context[start:end])
        answer.start, answer.end, answer.probability = start, end, probability
        return answer

    def __getnewargs__(self) -> Any:
        """For copies."""
        return " " * self.start + self, self.start, self.end, self.probability


class QuestionAnswering(Task):
    """The words of a context that answer a question.

    A long context goes to the model in pieces that overlap, each a feature with the whole question. Where data says of
    some questions that they have no answer, an empty answer is possible too.
    """

    name = "question-answering"
    auto_classes = ("QuestionAnswering",)
    columns = (TEXTS, ANSWER)

    def __init__(self, model: torch.nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        self.may_be_empty = False
        """Whether some question of the data has no answer."""

    @classmethod
    def new_head(cls, table: Table, options: Options) -> dict[str, Any]:
        """A score for the first and one for the last token of the answer."""
        return {"num_labels": 2}

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def encode(self, table: Table) -> Examples:
        """A feature for each piece of a context; the labels are its first and last token of the answer.

        Where a piece does not hold the answer, both labels are the token that stands for no answer (`[CLS]`).
        """
        need_offsets(self.processor, self.name)
        chosen = self.choose(table).names
        if len(chosen["text"]) != 2:
            raise DataError(f"--text-column must name two columns, the question and the context: {chosen['text']}")
        questions, contexts = (_filled(table, name) for name in chosen["text"])
        golds = None
        if "target" in chosen:
            if len(chosen["target"]) != 1:
                raise DataError(f"--target-column names {len(chosen['target'])} columns; this task reads one")
            golds = [answers(table, chosen["target"][0], row, context) for row, context in enumerate(contexts)]
            self.may_be_empty = self.may_be_empty or not all(golds)
        features, rows = self._pieces(table, questions, contexts)
        if golds is not None:
            self._label(features, rows, golds)
        inputs = [f"{question} | {context}" for question, context in zip(questions, contexts, strict=True)]
        references = None if golds is None else [[gold.text for gold in of_row] for of_row in golds]
        return Examples(features, rows, references, len(table), inputs)

    def _pieces(
        self, table: Table, questions: Sequence[str], contexts: Sequence[str]
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """The features of all rows, and the row of each."""
        found: list[tuple[int, dict[str, Any]]] = []
        for stride, members in self._strides(table, questions).items():
            encoded = token_ids(
                self.model,
                self.processor,
                [questions[row] for row in members],
                self.options.max_length,
                pairs=[contexts[row] for row in members],
                truncation="only_second",
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for i, member in enumerate(encoded["overflow_to_sample_mapping"]):
                row = members[member]
                feature = {key: encoded[key][i] for key in self.processor.model_input_names if key in encoded}
                offsets = np.array(encoded["offset_mapping"][i], np.int64)
                of_context = np.array([number == 1 for number in encoded.sequence_ids(i)])
                tokens = (of_context & (offsets[:, 1] > offsets[:, 0])).nonzero()[0]
                none = self.processor.cls_token_id
                ids = feature["input_ids"]
                feature |= {"_context": contexts[row], "_tokens": tokens, "_offsets": offsets[tokens]}
                feature["_none"] = ids.index(none) if none in ids else 0
                found.append((row, feature))
        found.sort(key=lambda pair: pair[0])
        empty = set(range(len(table))) - {row for row, feature in found if len(feature["_tokens"])}
        if empty:
            raise DataError(f"{table.where(min(empty))}: the context gives no token; remove the row")
        return [feature for _, feature in found], [row for row, _ in found]

    def _strides(self, table: Table, questions: Sequence[str]) -> dict[int, list[int]]:
        """How many tokens two pieces share -> the rows for which it is so; at most half of what fits in a piece."""
        limit = min(self.options.max_length, self.processor.model_max_length)
        special = self.processor.num_special_tokens_to_add(pair=True)
        strides: dict[int, list[int]] = {}
        for row, ids in enumerate(self.processor(list(questions), add_special_tokens=False)["input_ids"]):
            room = limit - special - len(ids)
            if room < LEAST_ROOM:
                raise DataError(
                    f"{table.where(row)}: a question of {len(ids)} tokens leaves no room for its context in {limit} "
                    f"tokens; pass --max-length {len(ids) + special + self.options.stride * 2} or more"
                )
            strides.setdefault(min(self.options.stride, room // 2), []).append(row)
        return strides

    def _label(self, features: Sequence[dict[str, Any]], rows: Sequence[int], golds: Sequence[Sequence[Gold]]) -> None:
        """Give each feature its labels, from the first answer of its row."""
        missed = {row for row, of_row in enumerate(golds) if of_row}
        for feature, row in zip(features, rows, strict=True):
            span = _tokens_of(feature["_offsets"], golds[row][0]) if golds[row] else None
            if span is not None:
                missed.discard(row)
                feature["start_positions"], feature["end_positions"] = (int(feature["_tokens"][i]) for i in span)
            else:
                feature["start_positions"] = feature["end_positions"] = feature["_none"]
        if missed:
            self.notes.append(
                f"answers that no piece of their context holds as a whole: {len(missed)}; they are learned as no "
                "answer (pass a larger --max-length)"
            )

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded; `_allowed` marks the tokens of the context, `_none` the one that stands for no answer."""
        batch = padded(self.processor, features, pad_to)
        length = batch["input_ids"].shape[1]
        marks = [np.zeros(len(feature["input_ids"]), bool) for feature in features]
        for mark, feature in zip(marks, features, strict=True):
            mark[feature["_tokens"]] = True
        batch["_allowed"] = beside(self.processor, [mark.tolist() for mark in marks], length, padding=False)
        is_left = self.processor.padding_side == "left"
        moved = [length - len(feature["input_ids"]) if is_left else 0 for feature in features]
        names = ["_none"]
        if all("start_positions" in feature for feature in features):
            names += ["start_positions", "end_positions"]
        for name in names:
            batch[name] = torch.tensor([feature[name] + by for feature, by in zip(features, moved, strict=True)])
        return batch

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first and the last token, each one among those of the context and the one for no answer."""
        rows = torch.arange(len(batch["_none"]), device=batch["_none"].device)
        allowed = batch["_allowed"].clone()
        allowed[rows, batch["_none"]] = True
        return [
            (logits.float().masked_fill(~allowed, NEVER), rows) for logits in (output.start_logits, output.end_logits)
        ]

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The most likely first and last token."""
        (start, _), (end, _) = self.positions(output, batch)
        return {"start_positions": start.argmax(-1), "end_positions": end.argmax(-1)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def read(self, model: torch.nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The logits of first and last token (2, 1 + tokens of the context): for no answer, then for each token."""
        both = torch.stack([output.start_logits, output.end_logits], 1).float().cpu()
        allowed, none = batch["_allowed"].cpu(), batch["_none"].cpu()
        return [torch.cat([both[i][:, none[i], None], both[i][:, allowed[i]]], 1).numpy() for i in range(len(both))]

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Answer:
        """The best answer over all pieces of the context; an empty one where that is possible and scores higher."""
        spans = [best_span(part[:, 1:]) for part in parts]
        scores = [score for score, _, _ in spans]
        best = int(np.argmax(scores))
        score, start, end = spans[best]
        nothing = [float(part[:, 0].sum()) for part in parts]
        if self.may_be_empty and min(nothing) > score:
            piece = int(np.argmin(nothing))
            return Answer("", 0, 0, _probability(parts[piece], min(nothing)))
        offsets, context = features[best]["_offsets"], features[best]["_context"]
        begin, stop = int(offsets[start, 0]), int(offsets[end, 1])
        answer = context[begin:stop]
        begin += len(answer) - len(answer.lstrip())
        return Answer(context, begin, begin + len(answer.strip()), _probability(parts[best], score))

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """F1 of the words of the answers, and how many are exactly right."""
        return ANSWERS

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The answer, how likely it is, and where it stands in the context, in characters."""
        return {
            "answer": str(prediction),
            "probability": prediction.probability,
            "start": prediction.start,
            "end": prediction.end,
        }


def best_span(logits: np.ndarray, longest: int = LONGEST) -> tuple[float, int, int]:
    """The score of the best answer of at most `longest` tokens, and its first and last token.

    logits: of first and last token (2, tokens). The score is their sum; of no tokens it is -inf.
    """
    start, end = logits.astype(np.float64)
    best = (-np.inf, 0, 0)
    for more in range(min(longest, len(start))):
        sums = start[: len(start) - more] + end[more:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + more)
    return best


def _probability(part: np.ndarray, score: float) -> float:
    """The product of two softmax probabilities whose logits add up to `score`."""
    logits = part.astype(np.float64)
    largest = logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
    return float(np.exp(score - log_sums.sum()))


def _tokens_of(offsets: np.ndarray, gold: Gold) -> tuple[int, int] | None:
    """The first and the last token of an answer, or None where the piece does not hold all of it.

    offsets: characters of the tokens (tokens, 2).
    """
    if not len(offsets) or offsets[0, 0] > gold.start or offsets[-1, 1] < gold.end:
        return None
    start = int(np.argmax(offsets[:, 1] > gold.start))
    end = len(offsets) - 1 - int(np.argmax(offsets[::-1, 0] < gold.end))
    return (start, end) if start <= end else None


def _filled(table: Table, name: str) -> list[str]:
    """The texts of a column; DataError, with the row, for one of blanks."""
    cells = texts(table, name)
    for row, cell in enumerate(cells):
        if not cell.strip():
            raise DataError(f"{table.where(row)}: column {name!r} is empty; fill it or remove the row")
    return cells
