"""Answers that stand in a text: from cells of a table, as plain texts or as SQuAD has them, and from files of SQuAD."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.data.table import Table
from secateur.errors import DataError, shown


@dataclass(frozen=True)
class Gold:
    """An answer.

    start, end: where it stands in the context, in characters, without blanks around it.
    """

    text: str
    start: int
    end: int


def answers(table: Table, name: str, row: int, context: str) -> list[Gold]:
    """The answers of a cell; none where the cell says that there is none.

    A cell is {"text": [...], "answer_start": [...]}, a list of {"text": ..., "answer_start": ...}, a text, or a list of
    texts; a text without a place stands for its first occurrence.

    Raises DataError, with the row, for an empty or another cell, and for an answer that is not where it should be.
    """
    cell = table.column(name)[row]
    if cell is None or cell == "":
        raise DataError(
            f"{table.where(row)}: column {name!r} is empty; write the answer, or an empty list where there is none"
        )
    found = []
    for text, start in _pairs(table, name, row, cell):
        if text.strip():
            found.append(_placed(table, row, context, text, start))
    return found


def _pairs(table: Table, name: str, row: int, cell: Any) -> list[tuple[str, Any]]:
    """Text and place of each answer of a cell; a place is None where the cell has none."""
    if isinstance(cell, Mapping) and "text" in cell:
        words, starts = (_list(cell.get(key)) for key in ("text", "answer_start"))
        if starts and len(starts) != len(words):
            raise DataError(
                f"{table.where(row)}: column {name!r} has {len(words)} answers and {len(starts)} places (answer_start)"
            )
        pairs = list(zip(words, starts or [None] * len(words), strict=True))
    else:
        pairs = [
            (part.get("text"), part.get("answer_start")) if isinstance(part, Mapping) else (part, None)
            for part in _list(cell)
        ]
    for text, _ in pairs:
        if not isinstance(text, str):
            raise DataError(
                f"{table.where(row)}: {shown(cell, 80)} in column {name!r} is no answer; write a text that stands in "
                'the context, or {"text": [...], "answer_start": [...]}'
            )
    return pairs


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if not isinstance(value, str | Mapping) and hasattr(value, "__iter__") else [value]


def _placed(table: Table, row: int, context: str, text: str, start: Any) -> Gold:
    """An answer at its place; DataError where the context has another text there, or nowhere the text."""
    if start is None:
        start = context.find(text)
        if start < 0:
            raise DataError(f"{table.where(row)}: the answer {shown(text, 80)} does not stand in the context")
    if not isinstance(start, int) or not 0 <= start <= len(context) - len(text):
        raise DataError(
            f"{table.where(row)}: an answer of {len(text)} characters at answer_start {shown(start, 40)} is outside "
            f"the context, which has {len(context)}"
        )
    end = start + len(text)
    if context[start:end] != text:
        raise DataError(
            f"{table.where(row)}: the context has {shown(context[start:end], 80)} at answer_start {start}, not the "
            f"answer {shown(text, 80)}"
        )
    begin = start + len(text) - len(text.lstrip())
    return Gold(text, begin, begin + len(text.strip()))


def questions_of_articles(records: list[Any], source: str) -> list[Any]:
    """The questions of a file of SQuAD, one a row, from its articles with paragraphs; other records as they are.

    Raises DataError for a paragraph without questions.
    """
    if not records or not all(isinstance(r, Mapping) and isinstance(r.get("paragraphs"), list) for r in records):
        return records
    rows = []
    for number, article in enumerate(records):
        for paragraph in article["paragraphs"]:
            asked = paragraph.get("qas") if isinstance(paragraph, Mapping) else None
            if not isinstance(asked, list) or not all(isinstance(question, Mapping) for question in asked):
                raise DataError(f"{source}, article {number} has a paragraph without a list of questions (qas)")
            rows += [{**question, "context": paragraph.get("context")} for question in asked]
    return rows
