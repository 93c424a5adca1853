"""secateur demo: the main job on a real model and real data."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.jobs.demo import Line

NAME = "demo"
EXAMPLES = ("secateur demo --output demo-out", "secateur demo --full --output demo-full")

COLUMNS = (
    "model",
    "dense",
    "pruned",
    "fine-tuned",
    "parameters",
    "not zero",
    "MB on disk",
    "latency ms",
    "of dense",
    "masked vs shrunk",
)


def command(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)] = Path(
        "demo-out"
    ),
    full: Annotated[bool, typer.Option("--full", help="More and longer reviews, 1,530 of them to test on.")] = False,
    cache: Annotated[Path, typer.Option(help="Where the trained dense model is kept.")] = Path(".cache/secateur"),
    train_rows: Annotated[
        int | None, typer.Option(help="Reviews to train on. [default: 1280; with --full 4000]", min=64)
    ] = None,
    epochs: Annotated[float, typer.Option(help="Epochs of every fine-tuning.", min=0.0)] = 1.0,
    threads: common.ThreadsOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Train MiniLM on movie reviews, prune it four ways, fine-tune, shrink, save, reload, compare."""
    from secateur.files import check_output

    start = time.perf_counter()
    check_output(output, overwrite=overwrite)
    common.note("loading torch and transformers ...")

    from dataclasses import asdict, replace

    from secateur.jobs.demo import FULL, SHORT, demo_rows, described, run_demo, slug, standard_error

    common.quiet_libraries()
    common.set_threads(threads)
    sizes = FULL if full else SHORT
    settings = replace(sizes, train_rows=train_rows or sizes.train_rows, epochs=epochs)
    lines = run_demo(output, cache, settings, overwrite=overwrite, track=common.track, say=common.note)
    if json:
        common.print_json([asdict(line) for line in lines])
        return
    train, test = demo_rows(settings)
    error = standard_error(lines[0].dense, len(test))
    common.print_table(
        f"MiniLM on {len(train):,} {described(settings)}; accuracy on {len(test):,} held-out reviews, "
        f"one standard error is about {100 * error:.1f} points",
        COLUMNS,
        [cells(line) for line in lines],
    )
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    common.say(f"plot: {output / 'demo.png'}   numbers: {output / 'demo.json'}   took {minutes} min {seconds} s")
    common.say("single zeros make the file smaller, not dense runtimes faster; removed heads and neurons do both")
    common.say("\nnext:")
    for line in next_commands(output, output / slug(lines[-1].name)):
        common.say(f"  {line}")


def cells(line: "Line") -> Sequence[str]:
    """One row of the table, in the order of `COLUMNS`."""
    return (
        line.name,
        common.percent(line.dense),
        "-" if line.pruned is None else common.percent(line.pruned),
        common.percent(line.tuned),
        common.millions(line.total),
        common.millions(line.nonzero),
        common.megabytes(line.bytes),
        f"{line.latency_ms:.1f}",
        f"{line.latency:.2f}",
        "-" if line.difference is None else f"{line.difference:.1e}",
    )


def next_commands(output: Path, pruned: Path) -> list[str]:
    """Three commands that run on what the demo has written."""
    program, dense = program_name(), output / "dense"
    return [
        f"{program} inspect {dense}",
        f"{program} prune {dense} --data {output / 'train.csv'} --eval-data {output / 'test.csv'} --criterion taylor "
        f"--pattern head,ffn --sparsity 0.3 --output {output}-pruned",
        f"{program} eval {pruned} --data {output / 'test.csv'} --against {dense}",
    ]


def program_name() -> str:
    """How the shell finds this program: by its name, or by a path where its environment is not activated."""
    if shutil.which("secateur"):
        return "secateur"
    return os.path.relpath(Path(sys.executable).with_name("secateur"))
