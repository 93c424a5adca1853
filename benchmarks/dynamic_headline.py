"""Fewer units, zeros and fewer tokens on one model: MiniLM on long reviews, in ONNX Runtime, nothing trained.

    python benchmarks/dynamic_headline.py make
    python benchmarks/dynamic_headline.py quality
    python benchmarks/dynamic_headline.py time [--threads 1]
    python benchmarks/dynamic_headline.py --write

The first line prunes the dense model of dynamic_models.py to half its multiply-accumulates by units, and the dense and
the smaller model to 80% zeros, one shot. The second scores every combination with and without the schedule `mid`. The
third exports each (zeros to our kernels) and calls them in turn. The fourth writes the dated Markdown.
"""

import argparse
import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dynamic_models
import transformers
from setting import setting
from tasks import secateur

from secateur import open as open_host
from secateur import prune
from secateur.data.read import read_table
from secateur.deploy import runner
from secateur.deploy.jobs.export import export
from secateur.deploy.operator_library import installed_library
from secateur.dynamic import prune_tokens
from secateur.jobs.open_task import look
from secateur.jobs.open_task import open_host as open_with_task
from secateur.repair import swaps
from secateur.select import Element
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, evaluate
from secateur.tasks.base.task import Options

WORK = dynamic_models.CACHE / "headline"
SPARSITY = 0.8
CALIBRATION_ROWS = 96
TEST_ROWS = 600
SCHEDULE = "mid"
SHAPES = ((1, 256), (8, 256))
TURNS = 12
PACKAGES = ("torch", "transformers", "onnxruntime")
NAMES = {"dense": "dense", "units": "half the MACs by units", "zeros": "80% zeros", "both": "units and zeros"}


def make() -> None:
    """Write the smaller models."""
    dense, files = dynamic_models.long_reviews()
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "units").exists():
        data = f"--data {files['train'].resolve()} --eval-data {files['calibration'].resolve()}"
        limits = "--target macs<=0.5 --heal-budget 0s --search-budget 20s --calibration-samples 256 --batch-size 16"
        words = f"--max-length {dynamic_models.LENGTH} --output units"
        secateur(WORK, "prune", str(dense.resolve()), data, limits, words)
    for source, name in ((dense, "zeros"), (WORK / "units", "both")):
        if (WORK / name).exists():
            continue
        host, task = open_with_task(look(str(source.resolve()), None), Options(max_length=dynamic_models.LENGTH))
        rows = task.encode(read_table(files["train"]).take(range(CALIBRATION_ROWS)))
        inner = [name for name in host.layout.linears if ".layer." in name]
        plan = prune(
            host, pattern=Element(), budget=SPARSITY, data=Batches(task, rows, 16), repair=swaps, weights=inner
        )
        host.apply(plan)
        host.save(WORK / name, plan)


def models() -> Iterator[tuple[str, bool, Any]]:
    """Name, whether tokens are left out, and the host of every combination."""
    dense, _ = dynamic_models.long_reviews()
    for name in NAMES:
        host = open_host(str((dense if name == "dense" else WORK / name).resolve()))
        yield name, False, host
        yield name, True, prune_tokens(host, SCHEDULE)


def quality() -> list[dict[str, Any]]:
    """Accuracy, agreement and KL of every combination."""
    dense, files = dynamic_models.long_reviews()
    host, task = open_with_task(look(str(dense.resolve()), None), Options(max_length=dynamic_models.LENGTH))
    batches = Batches(task, task.encode(read_table(files["test"]).take(range(TEST_ROWS))), 16)
    reference = Reference(task, host.model, batches)
    rows = []
    for name, has_schedule, other in models():
        found = evaluate(task, other.model, batches, reference)
        agreement = None if found.flips is None else 1 - found.flips
        row = {"name": name, "tokens": has_schedule, "accuracy": found.values[found.metric], "agreement": agreement}
        rows.append({**row, "kl": found.kl, "count": found.rows})
        print(rows[-1], flush=True)
    return rows


def times(threads: int) -> list[dict[str, Any]]:
    """Every combination, called in turn at each shape."""
    folders = {}
    for name, has_schedule, host in models():
        key = f"{name}-{'tokens' if has_schedule else 'all'}"
        folders[key] = WORK / "artefacts" / key
        if not folders[key].exists():
            sparse = {"sparse": True, "tokens": SHAPES[0][1]} if name in ("zeros", "both") else {}
            export(host.model, "onnx", folders[key], **sparse)
        print(key, flush=True)
    rows = []
    for batch, length in SHAPES:
        found = runner.measure(folders, batch, length, threads, TURNS, library=installed_library())
        rows += [{"batch": batch, "length": length, "threads": threads, "key": k, **row} for k, row in found.items()]
        print(json.dumps(rows[-len(folders) :]), flush=True)
    return rows


def write() -> Path:
    """Write the dated Markdown; returns its path."""
    scored = json.loads((WORK / "quality.json").read_text())
    timed = [row for path in sorted(WORK.glob("time-*.json")) for row in json.loads(path.read_text())]
    columns = list(dict.fromkeys((row["batch"], row["length"], row["threads"]) for row in timed))
    shown = [f"{b} x {n}, {t} thread{'s' if t > 1 else ''}" for b, n, t in columns]
    lines = [
        "# Units, zeros and tokens together: MiniLM on long reviews in ONNX Runtime, nothing trained",
        "",
        setting("`python benchmarks/dynamic_headline.py make`, `quality`, `time`, then `--write`", PACKAGES),
        "",
        f"{scored[0]['count']} test rows of up to {dynamic_models.LENGTH} tokens. Tokens: schedule `{SCHEDULE}`. Times "
        "are shares of the dense model's, all called in turn; in brackets what the gains of the parts multiply to.",
        "",
        f"| | tokens | accuracy | agreement | KL | {' | '.join(shown)} |",
        "|" + "---|" * (5 + len(shown)),
    ]
    ms = {(row["key"], row["batch"], row["length"], row["threads"]): row["median_ms"] for row in timed}
    for row in scored:
        cells = []
        for column in columns:
            dense, key = ms[("dense-all", *column)], f"{row['name']}-{'tokens' if row['tokens'] else 'all'}"
            share = ms[(key, *column)] / dense
            product = ms[(f"{row['name']}-all", *column)] / dense * ms[("dense-tokens", *column)] / dense
            cells.append(f"{share:.2f}" + (f" ({product:.2f})" if row["tokens"] and row["name"] != "dense" else ""))
        tokens = SCHEDULE if row["tokens"] else "all"
        lines.append(
            f"| {NAMES[row['name']]} | {tokens} | {row['accuracy']:.4f} | {row['agreement']:.1%} | {row['kl']:.4f} | "
            f"{' | '.join(cells)} |"
        )
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-token-headline.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["make", "quality", "time"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.what == "make":
        make()
    if options.what == "quality":
        (WORK / "quality.json").write_text(json.dumps(quality()))
    if options.what == "time":
        shutil.rmtree(WORK / "artefacts", ignore_errors=True)
        (WORK / f"time-{options.threads}.json").write_text(json.dumps(times(options.threads)))
    if options.write:
        print(write())


if __name__ == "__main__":
    main()
