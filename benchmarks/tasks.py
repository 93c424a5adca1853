"""Every task on the command line: what pruning half (or less) of the units costs, before and after one healing epoch.

    python benchmarks/tasks.py                train, prune, evaluate and export every row that has no result yet
    python benchmarks/tasks.py ROW ...        these rows again; the dense model of an earlier run is kept
    python benchmarks/tasks.py ROW ... --exports    only the exports of what was pruned before (--longer: the healing)
    python benchmarks/tasks.py write          the dated Markdown from the results under .cache/tasks/results

All that a row does is `secateur train`, `prune`, `eval --against` and `export`, each a process of its own with one
thread. `eval` reads the dense and the pruned folder in one process and on the same rows. The rows need the packages of
the extras demo, train, onnx and openvino, and sentence-transformers; see tasks_sources.py for what is fetched.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks_data as data
from tasks_report import write
from tasks_sources import CACHE

from secateur.files import new_folder, write_json

THREADS = 1
TARGETS = ("onnx", "openvino")
EXPORTED = 64
"""Test rows on which an exported model is compared."""


@dataclass(frozen=True)
class Row:
    """A task, and the options of its commands.

    title: model and data in words.
    make: writes start/ and the data into a folder.
    columns: options that name columns, for every command. length: the longest text in tokens, or a window's.
    train: options of `train`; None for a model that comes trained.
    prune: options of `prune`.
    train_data, test_data: what stands after --data.
    task: the task, where the config names another one.
    calibration: whether the training data is text for --calibration.
    check: called on the row's folder; what it found goes into the table.
    longer: epochs of another healing, where one epoch does not do.
    """

    title: str
    make: Callable[[Path], None]
    train: str | None
    prune: str
    columns: str = ""
    length: int | None = None
    train_data: str = "train.csv"
    test_data: str = "test.csv"
    task: str = ""
    calibration: bool = False
    check: Callable[[Path], dict[str, Any]] | None = None
    longer: int | None = None


HALF = "--criterion taylor --pattern head,ffn --sparsity 0.5 --fine-tune 1 --distil"
TINY = f"{HALF} --learning-rate 1e-3"
ROWS = {
    "text-classification": Row(
        "MiniLM on 1,280 Rotten Tomatoes reviews of at most 100 characters",
        data.text_classification,
        "--epochs 2 --learning-rate 2e-4",
        f"{HALF} --learning-rate 2e-4",
        length=48,
    ),
    "text-pairs": Row(
        "the classifier above on 1,280 pairs of very short reviews: the same sentiment?",
        data.text_pairs,
        "--epochs 2 --learning-rate 2e-4",
        f"{HALF} --learning-rate 2e-4",
        columns="--text-column text1,text2",
        length=64,
    ),
    "feature-extraction": Row(
        "MiniLM (sentence-transformers) on 1,280 reviews without labels; half of the FFN",
        data.feature_extraction,
        None,
        "--criterion taylor --pattern ffn --sparsity 0.5 --fine-tune 1 --distil --learning-rate 2e-4",
        length=48,
        task="feature-extraction",
        check=data.loads_in_sentence_transformers,
        longer=3,
    ),
    "image-classification": Row(
        f"DINOv2-S on 400 images of Fashion-MNIST, {data.IMAGE} pixels; 30% of heads and FFN",
        data.image_classification,
        "--epochs 5 --learning-rate 1e-4 --batch-size 16",
        "--criterion taylor --pattern head,ffn --sparsity 0.3 --fine-tune 1 --distil --learning-rate 1e-4 "
        "--batch-size 16",
        train_data="images --split train",
        test_data="images --split test",
    ),
    "text-generation": Row(
        "SmolLM2-135M on 12 IMDB reviews; 20% of the FFN",
        data.text_generation,
        None,
        "--criterion taylor --pattern ffn --sparsity 0.2 --fine-tune 1 --distil --samples 12 --batch-size 4",
        train_data="train.txt",
        test_data="test.txt",
        length=128,
        calibration=True,
    ),
    "automatic-speech-recognition": Row(
        "random Wav2Vec2 of 3 layers on 500 sounds: digits that espeak-ng speaks, voices to test on differ",
        data.speech,
        "--epochs 20 --learning-rate 2e-3 --batch-size 16",
        f"{HALF} --learning-rate 1e-3 --batch-size 16",
        columns="--audio-column file",
        longer=5,
    ),
    "token-classification": Row(
        "BERT of 2 layers, 800 sentences: persons and places",
        data.token_classification,
        "--epochs 4 --learning-rate 3e-3",
        TINY,
        train_data="train.jsonl",
        test_data="test.jsonl",
    ),
    "question-answering": Row(
        "BERT of 2 layers, 1,500 questions: the word after `in`",
        data.question_answering,
        "--epochs 8 --learning-rate 3e-3",
        TINY,
        train_data="train.jsonl",
        test_data="test.jsonl",
    ),
    "text2text-generation": Row(
        "T5 of 2 + 2 layers, 1,000 translations word for word",
        data.text2text,
        "--epochs 30 --learning-rate 3e-3",
        f"{HALF} --learning-rate 3e-3",
        longer=10,
    ),
    "fill-mask": Row(
        "BERT of 2 layers, 1,000 texts: colours in a cycle",
        data.fill_mask,
        "--epochs 30 --learning-rate 3e-3",
        f"{HALF} --learning-rate 3e-3",
        longer=4,
    ),
    "audio-classification": Row(
        "Wav2Vec2 of 2 layers, 240 tones of three pitches",
        data.audio_classification,
        "--epochs 6 --learning-rate 1e-3",
        TINY,
        train_data="train",
        test_data="test",
    ),
}


class CommandError(Exception):
    """A command of secateur ended badly; its last words."""


def secateur(folder: Path, *parts: str) -> tuple[dict[str, Any], float]:
    """Run a command in a folder with --json: what it printed, and its seconds."""
    words = [word for part in parts for word in shlex.split(part)] + ["--threads", str(THREADS), "--json"]
    print("secateur", *words, flush=True)
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", "from secateur.cli import main; main()", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)},
    )
    seconds = time.perf_counter() - start
    if found.returncode:
        print(found.stderr[-3000:], flush=True)
        lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
        raise CommandError(f"`secateur {words[0]}` ended with {found.returncode}: {lines[-1] if lines else 'no word'}")
    return json.loads(found.stdout), seconds


def run_row(name: str) -> dict[str, Any]:
    """All stages of a row, as far as they come; `failed` says where they did not."""
    row, folder = ROWS[name], CACHE / name
    result: dict[str, Any] = {"commands": [], "seconds": {}, "exports": {}}
    try:
        if not (folder / "start").exists():
            with new_folder(folder, overwrite=True) as temporary:
                row.make(temporary)
        measure(row, folder, result)
        if row.longer is not None:
            result["longer"] = heal_longer(row, folder)
        if row.check is not None:
            result["check"] = row.check(folder)
        result["exports"] = export_to_all(row, folder)
    except Exception as error:  # a row that fails is written down, and the next one runs
        result["failed"] = f"{type(error).__name__}: {error}" if not isinstance(error, CommandError) else str(error)
    return result


def test_data(row: Row) -> str:
    """Options of a command that reads the test rows of a saved model, but for the length of texts."""
    kind = f"--task {row.task}" if row.task else ""
    return " ".join(part for part in (f"--data {row.test_data}", row.columns, kind) if part)


def dense_of(row: Row) -> str:
    """The folder of the dense model."""
    return "start" if row.train is None else "dense"


def pruning(row: Row, options: str) -> list[str]:
    """What stands behind `secateur prune`, but for the output."""
    kind, length = f"--task {row.task}" if row.task else "", f"--max-length {row.length}" if row.length else ""
    if row.calibration:
        given = f"--calibration {row.train_data} --eval-data {row.test_data} --context {row.length}"
    else:
        held_out = row.test_data.replace("--split", "--eval-split")
        given = f"--data {row.train_data} --eval-data {held_out} {row.columns} {length}".strip()
    return [part for part in (dense_of(row), given, kind, options) if part]


def heal_longer(row: Row, folder: Path) -> dict[str, Any]:
    """The same pruning with more epochs behind it."""
    assert row.longer is not None
    options = row.prune.replace("--fine-tune 1", f"--fine-tune {row.longer}")
    outcome, seconds = secateur(folder, "prune", *pruning(row, options), "--output longer --overwrite")
    found = {key: outcome[key] for key in ("metric", "dense", "pruned", "drop", "drop_interval")}
    return {**found, "epochs": row.longer, "seconds": round(seconds, 1)}


def measure(row: Row, folder: Path, result: dict[str, Any]) -> None:
    """Train, prune and evaluate; what is found is put into `result` at once."""

    def call(stage: str, *parts: str) -> dict[str, Any]:
        found, seconds = secateur(folder, stage, *parts)
        result["commands"].append(f"secateur {' '.join(part for part in (stage, *parts) if part)}")
        result["seconds"][stage] = round(seconds, 1)
        return found

    dense, length = dense_of(row), f"--max-length {row.length}" if row.length else ""
    if row.train is not None:
        told = folder / "train.json"
        if not told.exists():
            shutil.rmtree(folder / "dense", ignore_errors=True)
            call("train", "start", f"--data {row.train_data}", row.columns, length, row.train, "--output dense")
            write_json(told, {"command": result["commands"][-1], "seconds": result["seconds"]["train"]})
        earlier = json.loads(told.read_text())
        result["commands"], result["seconds"] = [earlier["command"]], {"train": earlier["seconds"]}
    result["outcome"] = call("prune", *pruning(row, row.prune), "--output pruned --overwrite")
    result["outcome"].pop("provenance")
    result["evaluation"] = call("eval", "pruned", f"--against {dense}", test_data(row), length)


def export_to_all(row: Row, folder: Path) -> dict[str, Any]:
    """Export the pruned model to every target: how well it agrees there, or why it was refused."""
    found: dict[str, Any] = {}
    for target in TARGETS:
        written = f"--output {target} --samples {EXPORTED} --overwrite"
        try:
            made, seconds = secateur(folder, "export", f"pruned --to {target}", test_data(row), written)
            found[target] = {"parity": made["parity"], "seconds": round(seconds, 1)}
        except CommandError as error:
            found[target] = {"failed": str(error)}
    return found


def main() -> None:
    """Run rows, or write the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"write, or one of {', '.join(ROWS)}")
    parser.add_argument("--exports", action="store_true", help="the exports of these rows alone, of what was pruned")
    parser.add_argument("--longer", action="store_true", help="the longer healing of these rows alone")
    options = parser.parse_args()
    names = options.rows
    results = CACHE / "results"
    if names == ["write"]:
        print(write(results, {name: row.title for name, row in ROWS.items()}, THREADS))
        return
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {unknown[0]}; there is {', '.join(ROWS)}")
    results.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in ROWS if not (results / f"{name}.json").exists()]:
        if options.exports or options.longer:
            result = json.loads((results / f"{name}.json").read_text())
            if options.exports:
                result["exports"] = export_to_all(ROWS[name], CACHE / name)
            else:
                result["longer"] = heal_longer(ROWS[name], CACHE / name)
        else:
            result = run_row(name)
        write_json(results / f"{name}.json", result)
        print(name, result.get("failed", result.get("evaluation")), result["exports"], flush=True)


if __name__ == "__main__":
    main()
