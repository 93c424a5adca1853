"""secateur demo: the whole product in small, on a real model and real data."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli import common, progress

if TYPE_CHECKING:
    from secateur.jobs.demo_results import FewerTokens, Line, Shown

NAME = "demo"
EXAMPLES = ("secateur demo --output demo-out", "secateur demo --full --output demo-full")

COLUMNS = ("model", "accuracy", "pruned only", "KL", "parameters", "not zero", "MB on disk")


def command(
    *,
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)] = Path(
        "demo-out"
    ),
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="More and longer reviews, two speed-ups, training after the search, textbook procedures."
        ),
    ] = False,
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
    """Train MiniLM on movie reviews, make it faster in four ways, and measure all of them on each runtime."""
    from secateur.files import check_output

    start = time.perf_counter()
    check_output(output, overwrite=overwrite)
    progress.say("loading torch and transformers ...")

    from dataclasses import replace

    from secateur.jobs.demo import FULL, SHORT
    from secateur.jobs.demo_run import run_demo

    common.quiet_libraries()
    common.set_threads(threads)
    sizes = FULL if full else SHORT
    settings = replace(sizes, train_rows=train_rows or sizes.train_rows, epochs=epochs)
    shown = run_demo(output, cache, settings, overwrite=overwrite, track=progress.track, say=progress.say)
    if json:
        common.print_json(shown.as_json())
        return
    show(shown, output, time.perf_counter() - start)


def show(shown: "Shown", output: Path, seconds: float) -> None:
    """Print two tables, what they say, where the report lies, and how to go on."""
    from secateur.jobs.demo import standard_error
    from secateur.jobs.demo_results import REPORT
    from secateur.jobs.demo_run import SHAPE

    error = standard_error(shown.lines[0].dense, shown.test_rows)
    common.print_table(
        f"MiniLM: accuracy on {shown.test_rows:,} held-out reviews, one standard error is about "
        f"{100 * error:.1f} points",
        COLUMNS,
        [cells(line) for line in shown.lines],
    )
    runtimes = list(dict.fromkeys(name for line in shown.lines for name in line.latency))
    common.print_table(
        f"Latency of {SHAPE[0]} x {SHAPE[1]} tokens on one thread: ms (share of dense, timed in turn)",
        ["model", *runtimes],
        [times(line, runtimes) for line in shown.lines],
    )
    common.say(searched(shown))
    common.say(zeros(shown))
    common.say(tokens(shown.tokens))
    minutes, rest = divmod(round(seconds), 60)
    common.say(f"\nreport: {output / REPORT}   plot: {output / 'demo.png'}   took {minutes} min {rest} s")
    common.say(", ".join(f"{stage} {taken:.0f} s" for stage, taken in shown.seconds.items()))
    common.say("\nnext:")
    for line in next_commands(output, shown):
        common.say(f"  {line}")


def cells(line: "Line") -> Sequence[str]:
    """One row of the first table, in the order of `COLUMNS`."""
    return (
        line.name,
        common.percent(line.value),
        "-" if line.pruned is None else common.percent(line.pruned),
        "-" if line.kl is None else f"{line.kl:.3f}",
        common.millions(line.total),
        common.millions(line.nonzero),
        common.megabytes(line.bytes),
    )


def times(line: "Line", runtimes: Sequence[str]) -> Sequence[str]:
    """One row of the second table."""
    shown = [
        f"{line.latency_ms[name]:.1f} ({line.latency[name]:.2f})" if name in line.latency else "-" for name in runtimes
    ]
    return (line.name, *shown)


def searched(shown: "Shown") -> str:
    """What the search reached, beside uniform pruning."""
    parts = []
    found = [line for line in shown.lines if line.group == "chosen"]
    for asked, line, other in zip(shown.asked, found, shown.uniform, strict=False):
        faster, uniformly = (1 / one.latency[shown.runtime] for one in (line, other))
        parts.append(
            f"asked for {asked:g} times the speed on {shown.runtime}: {faster:.2f} times, accuracy "
            f"{common.percent(line.value)}; uniform pruning: {uniformly:.2f} times, {common.percent(other.value)}"
        )
    return "\n".join(parts)


def zeros(shown: "Shown") -> str:
    """Where zeros are fast and where they are not."""
    line = next(line for line in shown.lines if line.group == "zeros")
    parts = [f"{1 / share:.2f} times as fast on {name}" for name, share in line.latency.items()]
    return (
        f"{line.name}: {', '.join(parts)}. Zeros are fast on secateur's kernels: the runtime secateur, and onnx with "
        "--sparse"
    )


def tokens(found: "FewerTokens") -> str:
    """What fewer tokens bring on long texts."""
    parts = [f"{share:.2f} of the time on {name}" for name, share in found.latency.items()]
    return (
        f"fewer tokens, untrained, on {found.texts} texts of {found.length} tokens: {', '.join(parts)}; "
        f"{common.percent(found.agreement)} get the answer of all tokens"
    )


def next_commands(output: Path, shown: "Shown") -> list[str]:
    """Three commands that run on what the demo has written."""
    program, dense = program_name(), output / "dense"
    zeros = output / next(line.folder for line in shown.lines if line.group == "zeros")
    data = f"--data {output / 'train.csv'} --eval-data {output / 'test.csv'}"
    return [
        f"{program} prune {dense} {data} --speed-up 2.5 --on {shown.runtime} --max-drop 0.02 --output {output}-pruned",
        f"{program} eval {zeros} --data {output / 'test.csv'} --against {dense}",
        f'{program} run {zeros} "a film that I will see again"',
    ]


def program_name() -> str:
    """How the shell finds this program: by its name, or by a path where its environment is not activated."""
    if shutil.which("secateur"):
        return "secateur"
    return os.path.relpath(Path(sys.executable).with_name("secateur"))
