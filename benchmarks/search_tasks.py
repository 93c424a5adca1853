"""Other tasks pruned to twice the speed by the command line: pairs of reviews (MiniLM) and images (DINOv2-S).

    python benchmarks/search_tasks.py run [pairs] [images]
    python benchmarks/search_tasks.py --write

The first line keeps what `secateur prune --speed-up 2 --on onnx --max-drop 0.01 --json` prints, with an unused cache,
under .cache/search/asked; the second writes the dated Markdown. Models and rows are those of search_models.py.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import search_models
from setting import setting

KEPT = search_models.CACHE / "asked"
ASKED = "--speed-up 2 --on onnx --max-drop 0.01 --search-budget 20s --heal-budget 4min --threads 1"
ROWS = {
    "pairs": (
        search_models.pairs,
        ("train.csv", "test.csv"),
        "--text-column text1,text2 --label-column label --max-length 64 --length 64",
    ),
    "images": (search_models.images, ("images/train", "images/test"), ""),
}
"""Name -> what makes the folder, its rows to prune with and to test on, and options."""


def run(name: str) -> None:
    """Prune one model in an empty cache, and keep what the command says."""
    make, (train, test), options = ROWS[name]
    folder = make()
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "secateur", "prune", str(folder / "dense"), "--data", str(folder / train)]
        command += ["--eval-data", str(folder / test), *options.split(), *ASKED.split(), "--json"]
        environment = {**os.environ, "SECATEUR_CACHE": str(Path(temporary) / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--output", str(Path(temporary) / "small")], env=environment, stdout=subprocess.PIPE, text=True
        )
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(done.stdout)


def write() -> Path:
    """The Markdown from what was kept."""
    lines = [
        "# Twice the speed within one point, for pairs of texts and for images",
        "",
        setting("`python benchmarks/search_tasks.py run`, then `--write`", ("torch", "transformers", "onnxruntime")),
        "",
        f"`secateur prune {ASKED}`; batch 1; each artefact is timed in turn with the dense one on one thread.",
        "",
        "| model | asked | measured | metric: dense, pruned (drop, 95%) | test rows | parameters | met | seconds |",
        "|" + "---|" * 8,
    ]
    for name in ROWS:
        if not (KEPT / f"{name}.json").is_file():
            continue
        found = json.loads((KEPT / f"{name}.json").read_text())
        low, high = found["drop_interval"]
        lines.append(
            f"| {name} | 2 | {found['best']['speed_up']:.3f} | {found['metric']}: {found['dense']:.3f}, "
            f"{found['pruned']:.3f} ({found['drop']:+.3f}, {low:+.3f} to {high:+.3f}) | {found['rows']} | "
            f"{found['best']['parameters_share']:.2f} | {'yes' if found['met'] else 'no'} | "
            f"{sum(found['seconds'].values()):.0f} |"
        )
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-search-tasks.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"run, then some of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.what[:1] == ["run"]:
        for name in options.what[1:] or ROWS:
            run(name)
    if options.write:
        print(write())


if __name__ == "__main__":
    main()
