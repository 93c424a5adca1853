"""Token pruning of MiniLM on long texts: quality beside texts cut short and random tokens, and time on runtimes.

    python benchmarks/dynamic_text.py quality [--data reviews,newsgroups] [--schedules exact,mild,mid,fast]
    python benchmarks/dynamic_text.py time [--data reviews] [--schedules exact,mild,mid,fast] [--threads 1,2]
    python benchmarks/dynamic_text.py padding
    python benchmarks/dynamic_text.py --write

The first three lines keep their results under .cache/dynamic; the last writes the dated Markdown. Models and rows are
those of dynamic_models.py. Quality is that of PyTorch, on rows that nothing else saw. For times each model is exported,
and called in turn with the dense one on made-up texts of 256 tokens. Padding: the rows of short reviews in the order
of their file and in that of `Batches`, which is by length.
"""

import argparse
import datetime
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import dynamic_models
import search_models
import torch
import transformers
from setting import setting

from secateur.data.read import read_table
from secateur.deploy import runner
from secateur.deploy.jobs.export import export
from secateur.dynamic import prune_tokens
from secateur.dynamic.compare import Compared, compare
from secateur.jobs.open_task import look, open_host
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import parts_of
from secateur.tasks.base.task import Options

CACHE = dynamic_models.CACHE
DATA = {"reviews": dynamic_models.long_reviews, "newsgroups": dynamic_models.newsgroups}
RUNTIMES = ("onnx", "openvino")
SHAPES = ((1, 256), (8, 256))
TURNS = 15
ROWS = 256
"""Rows that `padding` runs on."""
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino")


def opened(name: str) -> tuple[Any, Any, dict[str, Path]]:
    """Host, task and files of rows of a data set."""
    folder, files = DATA[name]()
    host, task = open_host(look(str(folder.resolve()), None), Options(max_length=dynamic_models.LENGTH))
    return host, task, files


def quality(name: str, schedules: list[str]) -> dict[str, Any]:
    """Every schedule beside its baselines, on the test rows."""
    host, task, files = opened(name)
    batches = Batches(task, task.encode(read_table(files["test"])), 16)
    rows = compare(task, host, batches, {schedule: schedule for schedule in schedules})
    return {"data": name, "rows": [as_row(row) for row in rows], "count": batches.examples.count}


def as_row(row: Compared) -> dict[str, Any]:
    """What the table needs."""
    scored = row.evaluation
    return {
        "name": row.name,
        "work": row.work,
        "metric": scored.metric,
        "value": scored.values[scored.metric],
        "agreement": row.agreement,
        "kl": scored.kl,
        "keep": list(row.schedule.keep) if row.schedule else None,
    }


def times(name: str, schedules: list[str], threads: int) -> list[dict[str, Any]]:
    """Dense and every schedule, called in turn on each runtime at each shape."""
    host, _, _ = opened(name)
    work = CACHE / "artefacts"
    rows = []
    for runtime in RUNTIMES:
        folders = {}
        for schedule in ("dense", *schedules):
            model = host.model if schedule == "dense" else prune_tokens(host, schedule).model
            folders[schedule] = work / f"{name}-{runtime}-{schedule}"
            shutil.rmtree(folders[schedule], ignore_errors=True)
            export(model, runtime, folders[schedule])
        for batch, length in SHAPES:
            found = runner.measure(folders, batch, length, threads, TURNS)
            shape = {"runtime": runtime, "batch": batch, "length": length, "threads": threads}
            rows += [{**shape, "name": schedule, **row} for schedule, row in found.items()]
            print(json.dumps(rows[-len(folders) :], indent=1), flush=True)
    return rows


def padding() -> list[dict[str, Any]]:
    """Tokens and seconds of the dense model on batches of 32 rows in the order of the file, and by length, in turn."""
    folder, row = search_models.minilm(), {"name": "short reviews", "rows": ROWS}
    host, task = open_host(look(str((folder / "dense").resolve()), None), Options(max_length=64))
    examples = task.encode(read_table(folder / "test.csv").take(range(ROWS)))
    by_length, by_file = Batches(task, examples, 32), Batches(task, examples, 32)
    by_file.order = list(range(ROWS))
    row["texts"] = sum(map(task.length, examples.features))
    for order, batches in (("file", by_file), ("length", by_length)):
        row[f"{order}_tokens"] = sum(batch["input_ids"].numel() for batch in batches)
        row[f"{order}_seconds"] = []
    for _ in range(3):
        for order, batches in (("file", by_file), ("length", by_length)):
            start = time.process_time()
            for number in range(len(batches)):
                parts_of(task, host.model, batches, number)
            row[f"{order}_seconds"].append(time.process_time() - start)
    print(row, flush=True)
    return [row]


def write() -> Path:
    """Write the dated Markdown; returns its path."""
    lines = [
        "# Token pruning: MiniLM on long texts",
        "",
        setting("`python benchmarks/dynamic_text.py quality`, `time`, then `--write`", PACKAGES),
        "",
        "Nothing was trained with tokens left out. Work: the share of tokens that the blocks work on. Texts cut short "
        "have the same work, and so have random tokens. Agreement and KL: with the dense model.",
    ]
    for path in sorted(CACHE.glob("quality-*.json")):
        found = json.loads(path.read_text())
        lines += ["", f"## {found['data']}: {found['count']} test rows, up to {dynamic_models.LENGTH} tokens", ""]
        lines += [f"| | kept, % of the tokens | work | {found['rows'][0]['metric']} | agreement | KL |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in found["rows"]:
            keep = "" if row["keep"] is None else ", ".join(map(str, row["keep"]))
            kl, agreement = f"{row['kl']:.4f}", f"{row['agreement']:.1%}"
            lines.append(f"| {row['name']} | {keep} | {row['work']:.2f} | {row['value']:.4f} | {agreement} | {kl} |")
    timed = [row for path in sorted(CACHE.glob("time-*.json")) for row in json.loads(path.read_text())]
    if timed:
        lines += ["", "## Time of a call, all models in turn", ""]
        names = list(dict.fromkeys(row["name"] for row in timed))
        lines += ["| runtime | batch x tokens | threads | dense, ms | " + " | ".join(names[1:]) + " |"]
        lines += ["|" + "---|" * (3 + len(names))]
        keys = list(dict.fromkeys((row["runtime"], row["batch"], row["length"], row["threads"]) for row in timed))
        for key in keys:
            of_name = {r["name"]: r for r in timed if (r["runtime"], r["batch"], r["length"], r["threads"]) == key}
            dense = of_name["dense"]["median_ms"]
            ratios = [f"{of_name[name]['median_ms'] / dense:.2f}" for name in names[1:]]
            lines.append(f"| {key[0]} | {key[1]} x {key[2]} | {key[3]} | {dense:.1f} | {' | '.join(ratios)} |")
    if (CACHE / "padding.json").exists():
        lines += [
            "",
            "## Batches of 32 rows by length, as `run` and `eval` make them, beside the order of the file",
            "",
        ]
        lines += ["| | tokens in the texts | padded, by file | padded, by length | time by length / by file |"]
        lines += ["|---|---|---|---|---|"]
        for row in json.loads((CACHE / "padding.json").read_text()):
            share = statistics.median(row["length_seconds"]) / statistics.median(row["file_seconds"])
            counts = f"{row['texts']} | {row['file_tokens']} | {row['length_tokens']}"
            lines.append(f"| {row['rows']} {row['name']} | {counts} | {share:.2f} |")
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-token-pruning.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["quality", "time", "padding"])
    parser.add_argument("--data", default="reviews")
    parser.add_argument("--schedules", default="exact,mild,mid,fast")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    schedules = options.schedules.split(",")
    if options.what == "padding":
        (CACHE / "padding.json").write_text(json.dumps(padding(), indent=1))
    for name in options.data.split(",") if options.what in ("quality", "time") else ():
        if options.what == "quality":
            found = quality(name, schedules)
            (CACHE / f"quality-{name}.json").write_text(json.dumps(found, indent=1))
            print(json.dumps(found["rows"], indent=1), flush=True)
            continue
        for threads in map(int, options.threads.split(",")):
            rows = times(name, schedules, threads)
            (CACHE / f"time-{name}-{threads}.json").write_text(json.dumps(rows, indent=1))
    if options.write:
        print(write())


if __name__ == "__main__":
    main()
