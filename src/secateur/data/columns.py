"""Which column of a table is which: named by the user, or known by its usual name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.data.table import Table
from secateur.errors import DataError, listed, shown


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    role: what the column is to the task: `text`, `label`, `target`, `image`, `audio`, `question`, `context`, ...
    option: the option of the command line that names it.
    usual: the names under which it is looked for, the first that a table has is taken. A name such as
        `premise,hypothesis` stands for two columns that are read together.
    is_needed: whether the task can do nothing without it.
    """

    role: str
    option: str
    usual: tuple[str, ...]
    is_needed: bool = True


@dataclass(frozen=True)
class Choice:
    """The columns of a table by their roles, and what is to be said about those that nobody named.

    names: role -> name of the column, or several that are read together; a role that the table lacks is not there.
    found: sentences on columns that were found by their usual names.
    """

    names: Mapping[str, tuple[str, ...]]
    found: Sequence[str] = ()


def choose(table: Table, columns: Sequence[Column], named: Mapping[str, str | None]) -> Choice:
    """Find the columns of a task in a table.

    named: role -> what the user called it (several names with commas), or None.

    Raises DataError for a named column that does not exist, a needed one that is not found, and a role that the task
    does not read.
    """
    names: dict[str, tuple[str, ...]] = {}
    found: list[str] = []
    roles = {column.role for column in columns}
    for role, given in named.items():
        if given is not None and role not in roles:
            raise DataError(f"--{role}-column {given}: this task reads no {role}; it reads {listed(sorted(roles))}")
    for column in columns:
        given = named.get(column.role)
        if given is not None:
            names[column.role] = _given(table, given, column.option)
            continue
        usual = next((words for words in map(_split, column.usual) if all(w in table.columns for w in words)), None)
        if usual is not None:
            names[column.role] = usual
            if usual != _split(column.usual[0]):
                words = " and ".join(usual)
                found.append(f"the column {words} is taken as {column.role} ({column.option} names another)")
        elif column.is_needed:
            raise DataError(
                f"{table.source} has no column {' or '.join(column.usual)}; name the {column.role} with "
                f"{column.option}, one of {listed(table.columns)}"
            )
    return Choice(names, found)


def _given(table: Table, given: str, option: str) -> tuple[str, ...]:
    """The columns that a user named: one whose name has commas, or several with commas between them."""
    names = (given,) if given in table.columns else _split(given)
    for name in names:
        if name not in table.columns:
            raise DataError(f"{table.source} has no column {name!r} ({option}); it has {listed(table.columns)}")
    return names


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def texts(table: Table, name: str) -> list[str]:
    """The cells of a column as texts; DataError for an empty cell and for one that is no text and no number."""
    cells = []
    for row, cell in enumerate(table.column(name)):
        if cell is None or cell == "":
            raise DataError(f"{table.where(row)}: column {name!r} is empty; fill it or remove the row")
        if not isinstance(cell, str | int | float):
            raise DataError(f"{table.where(row)}: {shown(cell, 60)} in column {name!r} is no text")
        cells.append(str(cell))
    return cells


def number(value: Any) -> float | None:
    """A cell as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if abs(result) < float("inf") else None
