"""secateur bench: saved models on every runtime, side by side; or a kit that does so on another machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common, progress
from secateur.cli.shell import complete

if TYPE_CHECKING:
    from secateur.deploy.jobs.results import Bench

NAME = "bench"
EXAMPLES = (
    "secateur bench ./dense ./small --runtime torch,onnx --batch 1,8",
    "secateur bench ./dense ./small --runtime onnx --export-kit ./kit",
    "secateur bench --results ./kit",
    "secateur bench dense.keras small.keras",
)


def command(
    context_: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(help="Model folders, artefacts, or .keras files; the first is dense.")
    ] = None,
    *,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Of torch, secateur, onnx, openvino, executorch, litert, llama.cpp (.keras files: keras, litert, "
            "tflite, onnx, openvino, savedmodel); default: all installed but llama.cpp.",
            autocompletion=complete.some_of((*complete.RUNTIMES, "llama.cpp")),
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, e.g. 1,8.")] = "8",
    length: Annotated[str, typer.Option(help="Lengths in tokens, e.g. 64,128.")] = "64",
    turns: Annotated[int, typer.Option(help="Rounds in which the models take turns.", min=1)] = 12,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights on top (onnx, openvino, llama.cpp).")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare artefacts with the SHA-256 of their files first.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads of each process, pinned.", min=1)] = 1,
    export_kit: Annotated[
        Path | None, typer.Option(help="Write a folder to run on another machine instead.", rich_help_panel="Kit")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Show what a kit measured: its folder or file.", rich_help_panel="Kit")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.", rich_help_panel=common.OUTPUT_PANEL)] = None,
    report: common.ReportOption = None,
    task: common.TaskOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Time models in turn, each in a process of its own: median and quartiles, start-up, memory, bytes."""
    from secateur.cli import kinds
    from secateur.errors import SecateurError
    from secateur.files import check_output
    from secateur.find_host import is_keras_file

    some_keras = any(map(is_keras_file, models or ()))
    kind = "results" if results is not None else "keras" if some_keras else "kit" if export_kit is not None else "time"
    kinds.refuse(context_, kind)
    common.claim_report(report, overwrite=overwrite)
    for path in (plot, export_kit):
        if path is not None:
            check_output(path, overwrite=overwrite)
    sizes = {"batch": numbers(batch, "--batch"), "length": numbers(length, "--length")}
    chosen = None if runtime is None else [name.strip() for name in runtime.split(",") if name.strip()]
    if results is not None:
        if models:
            raise SecateurError("--results shows what was measured elsewhere; leave out models")
        from secateur.deploy.jobs.kit import read_results

        shown = read_results(results)
        show(shown, plot, json=json)
        write_report(shown, [], report)
        return
    if not models:
        raise SecateurError(
            "which models? pass folders, the dense one first, as in `secateur bench ./model ./small`, or --results of "
            "a kit"
        )
    options: dict[str, Any] = {**sizes, "threads": threads, "turns": turns, "say": progress.say}
    if some_keras:
        from secateur.cli import keras

        shown = time_and_show(lambda: keras.bench(models, chosen, **options), plot, json=json)
        write_report(shown, [], report)
        return
    common.quiet_libraries()
    options |= {"int8": int8, "check": check, "task": task}
    if export_kit is not None:
        _write_kit(models, export_kit, chosen, {**options, "overwrite": overwrite}, json=json)
        return
    from secateur.deploy.jobs.bench import bench

    shown = time_and_show(lambda: bench(models, chosen, **options), plot, json=json)
    write_report(shown, models, report)


def write_report(result: "Bench", models: list[str], report: Path | None) -> None:
    """Write the page of --report. models: the folders that were timed, by which their own records are found."""
    if report is None:
        return
    from secateur.deploy.jobs.bench import names_of
    from secateur.jobs.records import benched

    common.write_report(benched(result, names_of(models) if models else {}), report)


def time_and_show(measure: "Callable[[], Bench]", plot: Path | None, *, json: bool) -> "Bench":
    """Measure and show; after Ctrl-C the rows that were complete. Raises Interrupted then."""
    from secateur.deploy.jobs.results import BenchInterrupted
    from secateur.errors import Interrupted

    try:
        result = measure()
    except BenchInterrupted as stopped:
        show(stopped.result, plot, json=json)
        rows = len(stopped.result.timings)
        raise Interrupted(
            f"interrupted; the {rows} rows that were complete are shown, the others were not timed"
        ) from None
    show(result, plot, json=json)
    return result


def _write_kit(
    models: list[str], folder: Path, runtimes: list[str] | None, options: dict[str, Any], *, json: bool
) -> None:
    """Write an export kit, and print how to go on and what it lacks."""
    from secateur.deploy.jobs.kit import write_kit

    refused = write_kit(models, folder, runtimes, **options)
    if json:
        common.print_json({"kit": str(folder), "refused": refused})
        return
    for sentence in refused:
        common.say(f"left out: {sentence}")
    common.say(f"copy {folder} to the device and run `python device.py` in it; then `--results {folder}`")


def numbers(text: str, option: str) -> list[int]:
    """The whole numbers of a list such as 1,8."""
    from secateur.errors import SecateurError

    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise SecateurError(f"{option} {text!r} is not a list of whole numbers from 1 upwards, such as 1,8")
    return values


def show(result: "Bench", plot: Path | None, *, json: bool) -> None:
    """Print a table or JSON, and write a plot; SecateurError when every row failed."""
    from secateur.errors import SecateurError

    if plot is not None:
        from secateur.files import new_file
        from secateur.report.plots import plot_bench

        threads = "one thread" if result.threads == 1 else f"{result.threads} threads"
        title = f"{result.machine.get('processor', '')}, {threads}"
        with new_file(plot, overwrite=True) as file:  # `check_output` has claimed it
            plot_bench([vars(timing) for timing in result.timings], file, title)
    if json:
        common.print_json(result.as_json())
    else:
        show_table(result)
    if result.timings and all(t.error for t in result.timings):
        raise SecateurError("nothing could be timed; the rows say why, and `secateur doctor` what is installed")


def show_table(result: "Bench") -> None:
    """Print medians, a sentence for each row that has none, and the warnings."""
    from secateur.deploy.jobs.results import in_words

    rows = []
    for t in result.timings:
        if t.error:
            continue
        spread = f"{t.low_ms:.2f} to {t.high_ms:.2f}"
        rows.append(
            [
                *(t.runtime, t.model, in_words(t.batch, t.length), f"{t.median_ms:.2f}", spread, f"{t.ratio:.2f}"),
                *(f"{t.startup_s:.2f}", common.megabytes(t.peak_bytes), common.megabytes(t.bytes)),
            ]
        )
    columns = [
        "runtime",
        "model",
        "batch x length" if any(t.length for t in result.timings) else "batch",
        "ms",
        "quartiles",
        "of first",
        "start-up s",
        "peak MB",
        "MB on disk",
    ]
    common.print_table(f"A forward pass, {result.threads} thread(s), models in turn", columns, rows, left=3)
    for t in result.timings:
        if t.error:
            common.say(f"{t.runtime}, {t.model}, {in_words(t.batch, t.length)}: {t.error}")
    for sentence in result.warnings:
        common.say(sentence)
