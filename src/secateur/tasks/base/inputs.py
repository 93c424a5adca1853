"""What models only answer: tables without what is right, and tables of what stands on a command line."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from secateur.data.columns import Choice, Column, choose, texts
from secateur.data.table import Table
from secateur.errors import DataError

PROMPT = Column("text", "--text-column", ("text", "prompt", "content", "document", "sentence", "article", "review"))
"""What a decoder goes on with."""


def prompts(table: Table, named: Mapping[str, str | None]) -> tuple[list[str], Choice]:
    """The texts of a table for a decoder to go on with, and the choice of their column."""
    chosen = choose(table, (PROMPT,), named)
    names = chosen.names["text"]
    if len(names) > 1:
        raise DataError(f"--text-column names {len(names)} columns; a model goes on with one text")
    return texts(table, names[0]), chosen


def without_references(table: Table, columns: Sequence[Column], named: Mapping[str, str | None]) -> Table:
    """The table without the columns that a task can do without, which say what is right.

    columns: those of the task. named: role -> what the user called it.

    A table that then lacks a column, because one holds both inputs and what is right, stays as it is.
    """
    spare = [column for column in columns if not column.is_needed]
    needed = [column for column in columns if column.is_needed]
    names = choose(table, spare, {column.role: named.get(column.role) for column in spare}).names
    gone = {name for group in names.values() for name in group}
    rest = replace(table, columns={name: cells for name, cells in table.columns.items() if name not in gone})
    try:
        choose(rest, needed, {column.role: named.get(column.role) for column in needed})
    except DataError:  # the task says itself what it lacks
        return table
    return rest


def of_arguments(columns: Sequence[Column], cells: Sequence[str]) -> tuple[Table, dict[str, str | None]]:
    """Arguments as rows: one for each column that a task needs, in their order, and again for the next row.

    Returns the table, and its columns by role as `choose` takes them.

    Raises DataError where arguments are left over.
    """
    usual = {c.role: c.role if c.role in c.usual else c.usual[0] for c in columns if c.is_needed}
    names = [word.strip() for words in usual.values() for word in words.split(",")]
    width = max(1, len(names))
    if len(cells) % width:
        raise DataError(f"the model reads {' and '.join(names)}, and {len(cells)} arguments are not as many of each")
    places = [f"number {row + 1}" for row in range(len(cells) // width)]
    table = Table({name: list(cells[i::width]) for i, name in enumerate(names)}, "the arguments", places)
    return table, dict(usual)
