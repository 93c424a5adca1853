"""A folder of images or of sounds as a Table, laid out as for `datasets`: class folders, or a metadata file; splits."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from secateur.data.table import Table
from secateur.errors import DataError, listed

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables that name the files of a folder in a column `file_name`, and say more of each."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""A split -> how folders of it are called."""


def read_media(path: Path, split: str | None, read: Callable[[Path], Table]) -> Table | None:
    """The table of a folder: a column `image` or `audio`, and `label` or what a metadata file says; None without files.

    read: reads a metadata file.

    Raises DataError for a split that is needed or does not exist, and for a metadata file that names no files.
    """
    files = sorted(file for file in path.rglob("*") if _kind(file) and not file.name.startswith("."))
    if not files:
        return None
    kind = Counter(map(_kind, files)).most_common(1)[0][0]
    place = _place(path, split)
    metadata = next((place / name for name in METADATA if (place / name).is_file()), None)
    if metadata is not None:
        return _of_metadata(read(metadata), metadata, kind)
    own = [file for file in files if _kind(file) == kind and file.is_relative_to(place)]
    if not own:
        raise DataError(f"{place} holds no files with {'images' if kind == 'image' else 'sounds'}")
    columns: dict[str, Sequence[object]] = {kind: [str(file) for file in own]}
    classes = _classes(files, path)
    if classes:
        loose = next((file for file in own if file.parent.name not in classes), None)
        if loose is not None:
            raise DataError(f"{loose} lies in no class folder, other files do; move it, or write a {METADATA[0]}")
        columns["label"] = [classes.index(file.parent.name) for file in own]
    places = [str(file.relative_to(place)) for file in own]
    return Table(columns, str(place), places, {"label": classes} if classes else {})


def _kind(file: Path) -> str:
    """`image` or `audio`, by the suffix of a file; empty for others."""
    suffix = file.suffix.lower()
    return "image" if suffix in IMAGES else "audio" if suffix in SOUNDS else ""


def _splits(path: Path) -> dict[str, Path]:
    """The splits of a folder: train, validation, test -> its folder."""
    of_name = {word: split for split, words in SPLITS.items() for word in words}
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name.lower() in of_name)
    return {of_name[folder.name.lower()]: folder for folder in folders}


def _place(path: Path, split: str | None) -> Path:
    """The folder of a split, or the whole folder where it has none."""
    splits = _splits(path)
    if not splits:
        if split is not None:
            raise DataError(f"{path} has no splits; leave --split out")
        return path
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        asked = "--split is needed" if split is None else f"no split {split!r}"
        raise DataError(f"{path}: {asked}; it has {listed(splits)}")
    return splits[split]


def _classes(files: Sequence[Path], path: Path) -> list[str]:
    """The names of class folders in all splits, sorted; none where all files lie in one folder."""
    roots = {path, *_splits(path).values()}
    names = sorted({file.parent.name for file in files if file.parent not in roots})
    return names if len(names) > 1 else []


def _of_metadata(table: Table, file: Path, kind: str) -> Table:
    """The table of a metadata file, whose column `file_name` becomes `image` or `audio`."""
    if "file_name" not in table.columns:
        raise DataError(f"{file} has no column file_name; it has {listed(table.columns)}")
    columns = {kind if name == "file_name" else name: cells for name, cells in table.columns.items()}
    return replace(table, columns=columns, base=str(file.parent))
