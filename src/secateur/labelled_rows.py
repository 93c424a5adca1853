"""Rows of text and labels from CSV, JSON, JSON lines, Parquet or a `datasets` folder, checked as they are read."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import DataError, listed, shown

READERS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Texts, and a label for each text (or None where the data has no labels)."""

    texts: list[str]
    labels: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at the positions `indices`."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Rows([self.texts[i] for i in indices], labels)


def read_rows(
    path: str | Path, text_column: str = "text", label_column: str | None = None, split: str | None = None
) -> Rows:
    """Read a file or a `datasets` folder; `split` names a split of such a folder.

    Raises DataError: no such file or split, unknown kind of file, unknown column, no rows, empty cells.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no data at {path}")
    if path.is_dir():
        columns = _read_folder(path, split)
    else:
        if split is not None:
            raise DataError(f"--split {split} names a split of a datasets folder; {path} is a file")
        columns = _read_file(path)
    texts = [str(t) for t in _column(columns, text_column, path, "--text-column")]
    labels = list(_column(columns, label_column, path, "--label-column")) if label_column else None
    if not texts:
        raise DataError(f"{path} has no rows")
    return Rows(texts, [label.item() if hasattr(label, "item") else label for label in labels] if labels else None)


def _read_file(path: Path) -> Mapping[str, Any]:
    """Columns of a file, as a data frame of pandas."""
    import pandas as pd  # optional

    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path.name} is none of {', '.join(READERS)}; convert it, or pass a datasets folder")
    try:
        if kind == "parquet":
            return pd.read_parquet(path)
        if kind == "json":
            return pd.read_json(path, lines=path.suffix != ".json")
        separator = "\t" if kind == "tsv" else ","
        return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])  # "NA" and "null" are words
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} has no rows") from None
    except (ValueError, TypeError, OSError) as error:  # pandas raises TypeError for JSON that is no table
        raise DataError(f"{path} cannot be read as {kind}: {shown(str(error).splitlines()[0], 200)}") from None


def _read_folder(path: Path, split: str | None) -> Mapping[str, Any]:
    """Columns of a `datasets` folder, as a data frame of pandas."""
    from datasets import DatasetDict, load_from_disk  # optional

    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is not a datasets folder: {str(error).splitlines()[0]}") from None
    if isinstance(data, DatasetDict):
        if split not in data:
            asked = "--split is needed" if split is None else f"no split {split!r}"
            raise DataError(f"{path}: {asked}; it has {', '.join(data)}")
        data = data[split]
    elif split is not None:
        raise DataError(f"{path} has no splits; leave --split out")
    return data.to_pandas()


def _column(columns: Mapping[str, Any], name: str, path: Path, option: str) -> Any:
    """A column of a data frame; DataError where it does not exist or has empty cells. option: that names it."""
    if name not in columns:
        raise DataError(f"{path} has no column {name!r} ({option}); it has {listed(columns)}")
    column = columns[name]
    empty = column.isna()
    if empty.any():
        raise DataError(
            f"{path}: column {name!r} is empty in {int(empty.sum())} rows, first in row {int(empty.argmax())}"
        )
    return column


def label_ids(rows: Rows, label2id: Mapping[str, int], classes: int) -> list[int]:
    """Labels as class numbers; DataError when one does not fit a head of `classes` classes."""
    if rows.labels is None:
        raise DataError("labels are needed; name their column with --label-column")
    if classes < 2:
        raise DataError(f"the model's head has {classes} output; labels need a classifier with at least two classes")
    ids = []
    for label in rows.labels:
        number = label2id.get(str(label), label)
        if isinstance(number, str) and number.lstrip("-").isdigit():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int | float) or number % 1 != 0:
            raise DataError(f"label {shown(label)} is no class of the model; it knows {listed(label2id)}")
        if not 0 <= number < classes:
            raise DataError(
                f"label {shown(label)} is outside the {classes} classes of the model's head (0..{classes - 1})"
            )
        ids.append(int(number))
    return ids


def shuffled(rows: Rows, seed: int = 0) -> Rows:
    """The rows in a random order that the seed decides: files are often sorted by label."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.take(order)


def split_rows(rows: Rows, share: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Two disjoint parts, the second with about `share` of the rows of every label, both shuffled with the seed."""
    if not 0 < share < 1:
        raise DataError(f"cannot hold out a share of {share}; use a number between 0 and 1")
    groups: dict[Any, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(rows.labels[i] if rows.labels else None, []).append(i)
    rng = random.Random(seed)
    first: list[int] = []
    second: list[int] = []
    for key in sorted(groups, key=str):
        indices = groups[key]
        rng.shuffle(indices)
        cut = round(len(indices) * share)
        second += indices[:cut]
        first += indices[cut:]
    if not first or not second:
        raise DataError(f"{len(rows)} rows are too few to hold out {share:.0%} of them")
    rng.shuffle(first)
    rng.shuffle(second)
    return rows.take(first), rows.take(second)
