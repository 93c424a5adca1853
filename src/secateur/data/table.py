"""Table: named columns of equal length that know where each row stands in its file."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur import notebook
from secateur.errors import DataError, listed


@dataclass(frozen=True)
class Table:
    """Rows of data.

    columns: name -> one cell for each row; None is an empty cell.
    source: the file, folder or hub id that the rows come from.
    places: where each row stands in its source, such as `line 7`; empty where rows are only counted.
    class_names: column -> the names of the class numbers in it, of data that holds numbers and names apart.
    base: the folder that relative paths in cells start from; None for the working folder.
    """

    columns: Mapping[str, Sequence[Any]]
    source: str
    places: Sequence[str] = ()
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base: str | None = None

    def _repr_html_(self) -> str:
        rows = zip(*self.columns.values(), strict=True)
        return notebook.table(f"{self.source}: {len(self):,} rows", list(self.columns), rows, left=len(self.columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """The row in words, for an error: `reviews.csv, line 7`."""
        return f"{self.source}, {self.places[row] if self.places else f'row {row}'}"

    def column(self, name: str) -> Sequence[Any]:
        """The cells of a column; DataError when there is none of that name."""
        if name not in self.columns:
            raise DataError(f"{self.source} has no column {name!r}; it has {listed(self.columns)}")
        return self.columns[name]

    def take(self, rows: Sequence[int]) -> "Table":
        """The rows at the positions `rows`, in that order."""
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        places = [self.places[i] for i in rows] if self.places else [f"row {i}" for i in rows]
        return Table(columns, self.source, places, self.class_names, self.base)


def as_table(rows: Any, source: str = "the data") -> Table:
    """A Table of what people hold in Python: a Table, lists by name, objects with named values, a `datasets.Dataset`.

    Raises DataError for anything else, for columns of different lengths, and for no rows.
    """
    if isinstance(rows, Table):
        return rows
    if hasattr(rows, "column_names") and hasattr(rows, "features"):
        rows = of_dataset(rows, source)
        if not len(rows):
            raise DataError(f"{source} has no rows")
        return rows
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        rows = {name: [row.get(name) for row in rows] for name in names}
    if not isinstance(rows, Mapping):
        raise DataError(f"a {type(rows).__name__} is no table; pass lists by name, or objects with named values")
    if len({len(cells) for cells in rows.values()}) != 1 or not len(next(iter(rows.values()))):
        raise DataError(f"{source} has no rows, or columns of different lengths")
    return Table(rows, source)


def of_dataset(data: Any, source: str) -> Table:
    """The table of a `datasets.Dataset`: images and sounds stay files, and the names of class numbers are kept."""
    names = {}
    for name, feature in data.features.items():
        if getattr(feature, "decode", False):
            data = data.cast_column(name, type(feature)(decode=False))
        inner = getattr(feature, "feature", feature)  # of a list
        if getattr(inner, "names", None):
            names[name] = list(inner.names)
    return Table({name: list(data[name]) for name in data.column_names}, source, (), names)


def joined(tables: Sequence[Table]) -> Table:
    """The rows of all tables, one table after the other; DataError when their columns have different names."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            own, others = listed(table.columns), listed(first.columns)
            raise DataError(f"{table.source} has the columns {own}, {first.source} {others}; mixed texts need the same")
    columns = {name: [cell for table in tables for cell in table.columns[name]] for name in first.columns}
    places = [table.where(row) for table in tables for row in range(len(table))]
    return Table(columns, "the calibration texts", places, first.class_names, first.base)


def shuffled(table: Table, seed: int = 0) -> Table:
    """The rows in a random order that the seed decides: files are often sorted by label."""
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    return table.take(order)


def split_table(table: Table, share: float, seed: int = 0, by: str | None = None) -> tuple[Table, Table]:
    """Two disjoint parts, the second with about `share` of the rows, both shuffled with the seed.

    by: a column; each of its values gives the same share of its rows.

    Raises DataError when one of the parts would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"cannot hold out a share of {share}; use a number between 0 and 1")
    groups: dict[str, list[int]] = {}
    keys = table.column(by) if by is not None else ()
    for i in range(len(table)):
        groups.setdefault(str(keys[i]) if by is not None else "", []).append(i)
    rng = random.Random(seed)
    first: list[int] = []
    second: list[int] = []
    for key in sorted(groups):
        rows = groups[key]
        rng.shuffle(rows)
        cut = round(len(rows) * share)
        second += rows[:cut]
        first += rows[cut:]
    if not first or not second:
        raise DataError(f"{len(table)} rows are too few to hold out {share:.0%} of them")
    rng.shuffle(first)
    rng.shuffle(second)
    return table.take(first), table.take(second)
