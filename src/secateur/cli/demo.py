"""secateur demo: the main job on a real model and real data."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "demo"
EXAMPLES = ("secateur demo --output demo-out",)


def command(
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)] = Path(
        "demo-out"
    ),
    cache: Annotated[Path, typer.Option(help="Where the trained dense model is kept.")] = Path(".cache/secateur"),
    train_rows: Annotated[int, typer.Option(help="Reviews to train on.", min=64)] = 4000,
    epochs: Annotated[float, typer.Option(help="Epochs of every fine-tuning.", min=0.0)] = 1.0,
    threads: common.ThreadsOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Train MiniLM on movie reviews, prune it four ways, fine-tune, shrink, save, reload, compare."""
    from secateur.files import check_output

    check_output(output, overwrite=overwrite)
    common.note("loading torch and transformers ...")

    from dataclasses import asdict

    from secateur.jobs.demo import Settings, run_demo

    common.quiet_libraries()
    common.set_threads(threads)
    settings = Settings(train_rows=train_rows, epochs=epochs)
    lines = run_demo(output, cache, settings, overwrite=overwrite, track=common.track, say=common.note)
    if json:
        common.print_json([asdict(line) for line in lines])
        return
    common.print_table(
        "MiniLM on movie reviews (accuracy on 1,530 held-out reviews; one standard error is about 1 point)",
        [
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
        ],
        [
            (
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
            for line in lines
        ],
    )
    typer.echo(f"plot: {output / 'demo.png'}   numbers: {output / 'demo.json'}")
    typer.echo("single zeros make the file smaller, not dense runtimes faster; removed heads and neurons do both")
