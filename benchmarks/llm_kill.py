"""Kills runs of `secateur prune` on SmolLM2-135M at random moments, and compares the files that they end with.

For each set of stages the command runs once undisturbed; then it is started again and again and gets a SIGKILL, half
the time at a random moment after its start, half the time while a shard is being written, until all kills have hit. The
folder must then hold the same bytes, and nothing may lie beside it. Run:

    OMP_NUM_THREADS=1 python benchmarks/llm_kill.py [--kills 20] [--stages plain,all] [--write]
"""

import argparse
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

WINDOWS = ("--samples", "2", "--context", "64")
STAGES = {
    "plain": ("--criterion", "sparsegpt", "--pattern", "2:4"),
    "all": ("--criterion", "sparsegpt", "--sparsity", "0.5", "--sensitivity", "--reconstruct", "--distil"),
}
"""Options of the command."""
FASTEST_START = 3.0
"""Seconds before which no kill is tried: Python has not imported the libraries by then."""


def command(model: Path, text: Path, output: Path, options: tuple[str, ...]) -> list[str]:
    """The command line of a run."""
    words = ["prune", str(model), "--calibration", str(text), *WINDOWS, *options, "--output", str(output)]
    return [sys.executable, "-c", "import sys; from secateur.cli import main; main(sys.argv[1:])", *words]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The run, its standard error in a file."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("wb") as stream:
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=stream)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for_kill(process: Any, partial: Path, moment: float | None) -> None:
    """Until a moment in seconds, or until a shard is being written where that is None; or until the run ends."""
    began = time.perf_counter()
    while process.poll() is None:
        if moment is not None and time.perf_counter() - began > moment:
            return
        if moment is None and any(partial.glob("model-*.safetensors")):
            return
        time.sleep(0.001)


def try_stages(name: str, model: Path, text: Path, kills: int, place: Path) -> dict[str, Any]:
    """The row of one undisturbed run and one that is killed."""
    log = place / "log"
    began = time.perf_counter()
    if start(command(model, text, place / "whole", STAGES[name]), log).wait():
        raise SystemExit(log.read_text())
    seconds = time.perf_counter() - began
    place_of_run = place / "killed"
    place_of_run.mkdir()
    words = command(model, text, place_of_run / "out", STAGES[name])
    rng = random.Random(0)
    row: dict[str, Any] = {"stages": name, "kills": 0, "writing": 0, "starts": [], "whole_s": seconds, "equal": True}
    while True:
        process = start(words, log)
        if row["kills"] < kills:
            writing = rng.random() < 0.5
            wait_for_kill(
                process, place_of_run / ".out.partial", None if writing else rng.uniform(FASTEST_START, seconds)
            )
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                row["kills"] += 1
                row["writing"] += writing
        code = process.wait()
        found = re.search(r"(\d+) blocks? done before", log.read_text())
        row["starts"].append(int(found[1]) if found else 0)
        print(name, row["kills"], code, row["starts"][-1], flush=True)
        if code == 0:
            row["equal"] &= files(place_of_run / "out") == files(place / "whole")
            if row["kills"] == kills:
                row["stray"] = sorted(p.name for p in place_of_run.iterdir() if p.name != "out")
                return row
            shutil.rmtree(place_of_run / "out")
        elif code != -signal.SIGKILL:
            raise SystemExit(log.read_text())


def main() -> None:
    """Run the stages of --stages, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--write", action="store_true", help="Write benchmarks/results/DATE-llm-kill.md.")
    options = parser.parse_args()
    from models import package, smollm2_folder

    model, text = smollm2_folder(), package("gensim") / "test" / "test_data" / "lee_background.cor"
    rows = []
    for name in options.stages.split(","):
        with tempfile.TemporaryDirectory() as place:
            rows.append(try_stages(name, model, text, options.kills, Path(place)))
    lines = [
        f"| `{' '.join(STAGES[r['stages']])}` | {r['whole_s']:.0f} | {r['kills']} | {r['writing']} "
        f"| {', '.join(map(str, r['starts']))} | {'yes' if r['equal'] else 'NO'} | {', '.join(r['stray']) or 'none'} |"
        for r in rows
    ]
    date = datetime.now(UTC).date().isoformat()
    import torch

    document = (
        "# Runs that are killed\n\n"
        f"`python benchmarks/llm_kill.py --kills {options.kills} --stages {options.stages}`, {date}, SmolLM2-135M, "
        f"calibration on 2 x 64 tokens of Lee news, torch {torch.__version__}, Python {platform.python_version()}.\n\n"
        "Every run got its SIGKILL at a random moment, or while a shard was being written; a run that ended before all "
        "kills had hit was compared, deleted and begun again. A start that was killed before it said what it "
        "found counts as 0.\n\n"
        "| options | seconds undisturbed | kills that hit | while writing | blocks that each start found done "
        "| same bytes | left beside |\n|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    print(document)
    if options.write:
        (ROOT / "benchmarks" / "results" / f"{date}-llm-kill.md").write_text(document)
    sys.exit(not all(r["equal"] and not r["stray"] for r in rows))


if __name__ == "__main__":
    main()
