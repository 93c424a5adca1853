"""Answers of a model of any task to rows, and the text that a decoder goes on with: what `secateur run` prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import runtime
from secateur.data.table import Table
from secateur.deploy.gguf.generate import generate_text
from secateur.errors import ModelError
from secateur.jobs.open_task import Opened as Folder
from secateur.jobs.open_task import look
from secateur.runtime.saving import MANIFEST
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import parts_of
from secateur.tasks.base.inputs import PROMPT, of_arguments, prompts, without_references
from secateur.tasks.base.task import Options, Task
from secateur.tasks.find import kind_of, named, task_of_config
from secateur.torch.base.batches import without_labels
from secateur.torch.data.text_rows import load_tokenizer, token_ids
from secateur.torch.open import load_model
from secateur.torch.stats.linear_inputs import rows_read


@dataclass(frozen=True)
class Answer:
    """The answer to one row.

    input: what the model was given, for a person.
    ms: milliseconds that it took, a mean over the rows of its batch.
    shown: the answer as `Task.shown` gives it; of a decoder, how the text goes on, as `generated`.
    """

    input: str
    ms: float
    shown: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """A model folder that is to answer.

    task: None for a decoder, which goes on with its text.
    processor: what makes inputs of rows.
    is_compiled: whether the folder was saved compiled, so that its layers run as they were packed.
    """

    model: nn.Module
    task: type[Task] | None
    processor: Any
    is_compiled: bool

    def rows(self, data: Table | Sequence[str], options: Options) -> Rows | Prompts:
        """Rows as the model takes them; DataError for a row that does not fit it.

        data: a table, or arguments of a command line: texts, files, or several texts for each row.
        """
        table = data
        if not isinstance(table, Table):
            table, named = of_arguments((PROMPT,) if self.task is None else self.task.columns, table)
            options = replace(options, columns=named)
        if self.task is None:
            return Prompts(self.model, self.processor, table, options)
        return Rows(self.task(self.model, self.processor, options), table)


def open_to_answer(source: str, task: str | None = None) -> Opened:
    """Load a model folder, compiled or not, with the processor that lies beside it.

    Raises ModelError when the model neither has a task nor generates, DataError for an unknown task.
    """
    is_compiled = (Path(source) / MANIFEST).exists()
    kind: type[Task] | None
    if is_compiled:
        model = runtime.load(source)
        kind = task_of_config(model.config) if task is None else named(task)
    else:
        folder = _look(source, task)
        model = load_model(source) if folder is None else folder.model()
        kind = None if folder is None else folder.task
    if generates(model) and (kind is None or not getattr(model.config, "is_encoder_decoder", False)):
        return Opened(model, None, load_tokenizer(source), is_compiled)
    kind = kind or kind_of(model)
    return Opened(model, kind, kind.load_processor(source), is_compiled)


def _look(source: str, task: str | None) -> Folder | None:
    """What a folder is for; None for one without a task, which may generate nevertheless."""
    try:
        return look(source, task)
    except ModelError:
        if task is not None:
            raise
        return None


def generates(model: nn.Module) -> bool:
    """Whether the model writes tokens one after the other."""
    can = getattr(model, "can_generate", None)
    return bool(can is not None and can())


class Rows:
    """Rows that a model of a task answers."""

    def __init__(self, task: Task, table: Table) -> None:
        self.task = task
        self.examples = task.encode(without_references(table, task.columns, task.options.columns))
        self.notes: Sequence[str] = task.notes

    def example(self, batch_size: int) -> tuple[Any, int]:
        """The batch of the longest rows, and how many rows a linear layer reads in a call on it."""
        batch = without_labels(Batches(self.task, self.examples, batch_size)[0])
        return batch, rows_read(self.task.model, batch)

    def answers(self, model: nn.Module, batch_size: int) -> list[Answer]:
        """The answer to each row, in order; ModelError for NaN, and for a model without outputs of the task."""
        batches, features = Batches(self.task, self.examples, batch_size), self.examples.features
        parts: list[Any] = [None] * len(features)
        ms = [0.0] * self.examples.count
        for number in range(len(batches)):
            members = batches.members(number)
            start = time.perf_counter()
            with torch.inference_mode():
                found = parts_of(self.task, model, batches, number)
            took = (time.perf_counter() - start) * 1e3 / len(members)
            for member, part in zip(members, found, strict=True):
                parts[member] = part
                ms[self.examples.rows[member]] += took
        of_row: list[list[int]] = [[] for _ in ms]
        for member, row in enumerate(self.examples.rows):
            of_row[row].append(member)
        answers = []
        for own, took, given in zip(of_row, ms, self.examples.inputs or [""] * len(ms), strict=True):
            read = [parts[i] for i in own]
            prediction = self.task.predict(read, [features[i] for i in own])
            answers.append(Answer(given, took, self.task.shown(prediction, read)))
        return answers


class Prompts:
    """Texts that a model goes on with."""

    def __init__(self, model: nn.Module, tokenizer: Any, table: Table, options: Options) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.texts, chosen = prompts(table, options.columns)
        self.notes: Sequence[str] = chosen.found

    def example(self, batch_size: int) -> tuple[Any, tuple[int, int]]:
        """The first texts as a batch, and how many tokens a call has: one for a step, many for a prompt."""
        encoded = token_ids(self.model, self.tokenizer, self.texts[:batch_size], self.options.max_length)
        batch = dict(self.tokenizer.pad(encoded, return_tensors="pt"))
        return batch, (1, min(self.options.max_length, 128))

    def answers(self, model: Any, batch_size: int) -> list[Answer]:
        """The greedy continuation of each text, one text at a time.

        Raises DataError for a text that gives no token, or, with the new tokens, more than the model has positions.
        """
        reads_twice = getattr(model.config, "is_encoder_decoder", False)
        added = self.options.new_tokens
        answers = []
        for text in self.texts:
            encoded = token_ids(
                model, self.tokenizer, [text], self.options.max_length, new_tokens=0 if reads_twice else added
            )
            batch = self.tokenizer.pad(encoded, return_tensors="pt")
            batch.pop("token_type_ids", None)
            start = time.perf_counter()
            with torch.inference_mode():
                ids = model.generate(
                    **batch, max_new_tokens=added, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
                )
            ms = (time.perf_counter() - start) * 1e3
            new = ids[0, 0 if reads_twice else batch["input_ids"].shape[1] :]
            answers.append(Answer(text, ms, {"generated": self.tokenizer.decode(new, skip_special_tokens=True)}))
        return answers


def compiled(opened: Opened, rows: Rows | Prompts, batch_size: int, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The model on the sparse kernels, and a sentence that says what was sped up.

    rows: it is traced on a batch of them. options: of `secateur.runtime.compile`.
    """
    if opened.is_compiled:
        return opened.model, "The folder was saved compiled: its layers run as they were packed."
    example, tokens = rows.example(batch_size)
    untraced = ""
    try:
        fast = runtime.compile(opened.model, tokens=tokens, example=example, **options)
    except ModelError as error:
        fast = runtime.compile(opened.model, tokens=tokens, **options)
        untraced = f" Nothing was fused: {error}"
    report: Any = fast.secateur_report
    return fast, report.summary() + untraced


def answers_of_gguf(
    folder: str, data: Table | Sequence[str], options: Options, threads: int = 1
) -> tuple[list[Answer], Sequence[str]]:
    """How a GGUF artefact goes on with each text, on llama.cpp, and sentences on what was read of the data.

    Raises SecateurError for data without texts, and for a text that is too long.
    """
    table, named = (data, options.columns) if isinstance(data, Table) else of_arguments((PROMPT,), data)
    texts, chosen = prompts(table, named)
    written = generate_text(folder, texts, options.new_tokens, threads=threads)
    answers = [
        Answer(text, one.prompt_ms + one.decode_ms, {"generated": one.text})
        for text, one in zip(texts, written, strict=True)
    ]
    return answers, chosen.found
