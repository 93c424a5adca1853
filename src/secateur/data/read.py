"""Reads data into a Table: CSV, TSV, JSON, JSON lines, Parquet, plain text, a `datasets` folder, a folder of images or
of sounds, and a data set of the hub.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.data.answers import questions_of_articles
from secateur.data.folders import IMAGES, SOUNDS, read_media, read_one
from secateur.data.table import Table, of_dataset
from secateur.errors import DataError, listed, shown
from secateur.schemas.reading import parse

LONGEST_CELL = 2**27
"""Characters that a cell of a CSV may have."""
LARGEST_JSON = 2**31
"""Bytes of a JSON file that is read whole."""


def read_table(source: str | Path, split: str | None = None) -> Table:
    """Read a file, a folder, or a data set of the hub (`org/name`); `split` names a split of a folder or data set.

    A single image or sound is a table of one row.

    Raises DataError: nothing of that name, an unknown kind of file, a row that cannot be read, no rows, no such split.
    """
    path = Path(source)
    if not path.exists():
        table = _read_hub(str(source), split)
    elif path.is_dir():
        table = _read_folder(path, split)
    else:
        if split is not None:
            raise DataError(f"--split {split} names a split of a datasets folder; {path} is a file")
        table = read_one(path) or _read_file(path)
    if not len(table):
        raise DataError(f"{source} has no rows")
    return table


def _read_file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} is none of {', '.join(READERS)}; convert it, or pass a datasets folder")
    return replace(reader(path), base=str(path.parent))


# -- files ------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Table:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Table:
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Table:
    """A CSV or TSV with a line of names; an empty cell is None, every other cell a text."""
    before = csv.field_size_limit(LONGEST_CELL)
    rows: list[list[str | None]] = []
    places: list[str] = []
    line = 1
    try:
        reader = csv.reader((text for _, text in _lines(path)), delimiter=separator, strict=True)
        names = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(names):
                    raise DataError(f"{path}, line {line} has {len(cells)} cells; the first line names {len(names)}")
                rows.append([cell if cell else None for cell in cells])
                places.append(f"line {line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line} cannot be read as CSV: {shown(str(error), 200)}") from None
    finally:
        csv.field_size_limit(before)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {shown(twice)} twice; rename one")
    return Table({name: [row[i] for row in rows] for i, name in enumerate(names)}, str(path), places)


def _read_json_lines(path: Path) -> Table:
    """An object on each line."""
    records, places = [], []
    for number, line in _lines(path):
        if line.strip():
            try:
                records.append(parse(line, infinite=True))
            except ValueError as error:
                raise DataError(f"{path}, line {number} is no JSON: {shown(str(error), 200)}") from None
            places.append(f"line {number}")
    return _of_records(records, path, places)


def _read_json(path: Path) -> Table:
    """A list of objects; or the objects under `data`; or the questions of a SQuAD file; or columns of equal length."""
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{path} is larger than {LARGEST_JSON / 2**30:.0f} GiB; write it as JSON lines (.jsonl)")
    try:
        value = parse(path.read_text(encoding="utf-8-sig"), infinite=True)
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; convert it") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {shown(str(error), 200)}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        if not value or not all(isinstance(cells, list) for cells in value.values()):
            raise DataError(f"{path} is no table; it must be a list of objects, or lists of equal length by name")
        if len({len(cells) for cells in value.values()}) != 1:
            raise DataError(f"{path} has columns of different lengths")
        return Table(value, str(path))
    if isinstance(value, list):
        value = questions_of_articles(value, str(path))
    return _of_records(value, path, [f"row {i}" for i in range(len(value))] if isinstance(value, list) else [])


def read_text(path: Path) -> Table:
    """Plain text in UTF-8 as documents, in the column `text`.

    Empty lines separate documents; where there are none, each line is a document.
    """
    lines = [(number, line.rstrip("\r\n")) for number, line in _lines(path)]
    parts: list[tuple[int, list[str]]] = []
    is_inside = False
    for number, line in lines:
        if line.strip():
            if not is_inside:
                parts.append((number, []))
            parts[-1][1].append(line)
        is_inside = bool(line.strip())
    if len(parts) <= 1:
        parts = [(number, [line]) for number, line in lines if line.strip()]
    places = [f"line {number}" for number, _ in parts]
    return Table({"text": ["\n".join(text).strip() for _, text in parts]}, str(path), places)


def _read_parquet(path: Path) -> Table:
    import pyarrow  # optional
    from pyarrow import parquet

    try:
        data = parquet.read_table(path)
        columns = {str(name): data.column(name).to_pylist() for name in data.column_names}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {shown(' '.join(str(error).split()), 200)}") from None
    return Table(columns, str(path), (), _class_names(data.schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of class numbers that `datasets` writes into a Parquet file, by column."""
    try:
        features = parse(metadata[b"huggingface"].decode())["info"]["features"]
        return {
            name: [str(word) for word in feature["names"]]
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError):  # not there, or not as datasets writes it
        return {}


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": read_text,
}
"""Suffix of a file -> its reader."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; DataError, with the line, when it is no UTF-8."""
    with path.open("rb") as file:  # a file opened as text is decoded in parts of many lines
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number} is no UTF-8 text; convert it") from None


def _of_records(records: Any, path: Path, places: Sequence[str]) -> Table:
    """A table of objects; a key that an object lacks is an empty cell."""
    if not isinstance(records, list):
        raise DataError(f"{path} is no table; it must be a list of objects, or lists of equal length by name")
    names: dict[str, None] = {}
    for record, place in zip(records, places, strict=True):
        if not isinstance(record, dict):
            raise DataError(f"{path}, {place} is {shown(record)}, not an object with named values")
        names.update(dict.fromkeys(record))
    if len(names) > 1000:
        raise DataError(f"{path} has {len(names)} different names of columns; a table has at most 1000")
    return Table({name: [record.get(name) for record in records] for name in names}, str(path), places)


# -- folders and the hub ----------------------------------------------------------------------------------------------


def _read_folder(path: Path, split: str | None) -> Table:
    """A `datasets` folder, or one of images or sounds."""
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import load_from_disk  # optional

        try:
            return _of_datasets(load_from_disk(str(path)), str(path), split)
        except DataError:
            raise
        except Exception as error:  # damaged folders raise many types
            raise DataError(f"{path} is not a datasets folder: {shown(' '.join(str(error).split()), 200)}") from None
    table = read_media(path, split, read_table)
    if table is None:
        raise DataError(f"{path} is not a datasets folder, and holds no images ({IMAGES[0]} ...) and no sounds "
                        f"({SOUNDS[0]} ...)")  # fmt: skip
    return table


def _read_hub(name: str, split: str | None) -> Table:
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).suffix.lower() in READERS:
        raise DataError(f"no data at {name}; pass a file, a folder, or the name of a data set of the hub")
    from datasets import load_dataset  # optional

    try:
        return _of_datasets(load_dataset(name), name, split)
    except DataError:
        raise
    except Exception as error:  # the hub, the network and the scripts of data sets fail in many ways
        raise DataError(
            f"no data at {name}, and no data set of that name could be loaded from the hub or its cache: "
            f"{shown(' '.join(str(error).split()), 200)}"
        ) from None


def _of_datasets(data: Any, source: str, split: str | None) -> Table:
    """The table of a data set; images and sounds stay files, which `secateur.data.media` decodes."""
    from datasets import DatasetDict  # optional

    if isinstance(data, DatasetDict):
        if split not in data:
            asked = "--split is needed" if split is None else f"no split {split!r}"
            raise DataError(f"{source}: {asked}; it has {listed(data)}")
        data = data[split]
    elif split is not None:
        raise DataError(f"{source} has no splits; leave --split out")
    return of_dataset(data, source)
