"""The self-cascade and one early exit of MiniLM on long reviews: agreement on fresh rows, and time on ONNX Runtime.

    python benchmarks/dynamic_cascade.py [--schedules mid,fast] [--agreement 0.99] [--rows 2000] [--threads 1,2]
    python benchmarks/dynamic_cascade.py --write

The first line keeps its results under .cache/dynamic; the second writes the dated Markdown. Models and rows are those
of dynamic_models.py. Thresholds and the head of the exit come from the calibration rows, 600 without labels. Every test
row then goes through the dense program and through each cascade in turn, batch by batch, by length as `run` makes
batches: what is timed is what is counted. The exit is for batch 1.
"""

import argparse
import datetime
import json
import shutil
import time
from pathlib import Path
from typing import Any

import dynamic_models
import numpy as np
import torch
import transformers
from setting import setting

from secateur.data.read import read_table
from secateur.deploy import runner
from secateur.deploy.jobs.export import export
from secateur.dynamic import calibrate, fit_exit, prune_tokens
from secateur.dynamic.certificate import lower_bound
from secateur.errors import SecateurError
from secateur.jobs.open_task import look, open_host
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Options
from secateur.torch.base.batches import without_labels

CACHE = dynamic_models.CACHE
RESULT = CACHE / "cascade.json"
BATCHES = (8, 1)
SURE = 0.95
PACKAGES = ("torch", "transformers", "onnxruntime")


def exported(
    schedules: list[str], agreement: float, most: dict[str, int]
) -> tuple[dict[str, Path], dict[str, str], Any, Any]:
    """Artefacts by name, what calibration says of each, the task, and the test rows as it encodes them."""
    folder, files = dynamic_models.long_reviews()
    host, task = open_host(look(str(folder.resolve()), None), Options(max_length=dynamic_models.LENGTH))
    tables = {name: read_table(files[name]) for name in most}
    encoded = {name: task.encode(table.take(range(min(most[name], len(table))))) for name, table in tables.items()}
    calibration = [inputs(batch) for batch in Batches(task, encoded["calibration"], 8)]
    made, words = {"dense": CACHE / "artefacts" / "cascade-dense"}, {}
    shutil.rmtree(made["dense"], ignore_errors=True)
    export(host.model, "onnx", made["dense"])
    for name in [*schedules, "exit"]:
        place = CACHE / "artefacts" / f"cascade-{name}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            if name == "exit":
                model, decision = host.model, fit_exit(host, calibration, agreement, SURE)
            else:
                pruned = prune_tokens(host, name)
                model, decision = pruned.model, calibrate(pruned, calibration, agreement, SURE)
            export(model, "onnx", place, data=calibration[:8], cascade=decision)
        except SecateurError as error:
            words[name] = str(error)
            continue
        made[name], words[name] = place, str(decision)
        print(f"{name}: {decision}", flush=True)
    return made, words, task, encoded["test"]


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    """What the model reads of a batch."""
    return {name: value for name, value in without_labels(batch).items() if isinstance(value, torch.Tensor)}


def measured(made: dict[str, Path], task: Any, examples: Any, size: int, threads: int) -> list[dict[str, Any]]:
    """Seconds, agreement with the dense program and the share of escalated rows of each artefact, called in turn."""
    programs = {
        name: runner.load(path, threads=threads) if name == "dense" else runner.open_cascade(path, threads)
        for name, path in made.items()
        if name != "exit" or size == 1
    }
    seconds, agreed, escalated = (dict.fromkeys(programs, 0.0) for _ in range(3))
    rows = 0
    for number, batch in enumerate(Batches(task, examples, size)):
        feed = {name: value.numpy() for name, value in inputs(batch).items()}
        outputs = {}
        order = list(programs)[:: 1 if number % 2 else -1]
        for name in order:
            start = time.perf_counter()
            outputs[name] = programs[name](feed)
            seconds[name] += time.perf_counter() - start if number else 0.0  # the first call warms up
        answers = outputs["dense"]["logits"].argmax(1)
        rows += len(answers)
        for name, output in outputs.items():
            agreed[name] += int((output["logits"].argmax(1) == answers).sum())
            escalated[name] += int(np.sum(output.get(runner.ESCALATED, 0)))
    return [
        {
            "batch": size,
            "threads": threads,
            "name": name,
            "rows": rows,
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["dense"],
            "agreement": agreed[name] / rows,
            "certain": lower_bound(rows, rows - int(agreed[name]), SURE),
            "escalated": escalated[name] / rows,
        }
        for name in programs
    ]


def write() -> Path:
    """Write the dated Markdown; returns its path."""
    found = json.loads(RESULT.read_text())
    lines = [
        "# Self-cascade and early exit: MiniLM on long reviews, ONNX Runtime",
        "",
        setting("`python benchmarks/dynamic_cascade.py`, then `--write`", PACKAGES),
        "",
        f"Asked for: {found['agreement']:.1%} agreement with the dense model at {SURE:.0%}. Calibration rows say:",
        "",
        *(f"- {name}: {sentence}" for name, sentence in found["words"].items()),
        "",
        "On fresh rows. Certain: the agreement that these rows prove with a probability of 95%. Time: wall-clock time "
        "of all rows, over that of the dense program.",
        "",
        "| | batch | threads | rows | time | agreement | certain | escalated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = f"{row['ratio']:.2f} | {row['agreement']:.2%} | {row['certain']:.2%} | {row['escalated']:.1%}"
        lines.append(f"| {row['name']} | {row['batch']} | {row['threads']} | {row['rows']} | {cells} |")
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-cascade.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", default="mid,fast")
    parser.add_argument("--agreement", type=float, default=0.99)
    parser.add_argument("--rows", type=int, default=dynamic_models.ROWS["test"])
    parser.add_argument("--calibration", type=int, default=dynamic_models.ROWS["calibration"], help="rows")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        print(write())
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    most = {"calibration": options.calibration, "test": options.rows}
    made, words, task, examples = exported(options.schedules.split(","), options.agreement, most)
    rows = []
    for threads in map(int, options.threads.split(",")):
        for size in BATCHES:
            rows += measured(made, task, examples, size, threads)
            print(json.dumps(rows[-len(made) :], indent=1), flush=True)
    RESULT.write_text(json.dumps({"agreement": options.agreement, "words": words, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
