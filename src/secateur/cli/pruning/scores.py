"""`secateur eval --task perplexity`: a language model beside the dense one and beside fewer bits, in one table."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli import common
from secateur.cli.kinds import given

if TYPE_CHECKING:
    from secateur.jobs.language.harness import Tasks, TaskScore
    from secateur.jobs.language.rows import Compared, Row
    from secateur.scores import TextScore

DASH = "-"


def evaluate(context: typer.Context, options: dict[str, Any]) -> None:
    """Print the rows, write the page of --report.

    context: of the command, with its parameters. options: for loading the models.
    """
    import time

    from secateur.documents import read_documents
    from secateur.errors import DataError

    params = context.params
    text: Path | None = params["text"]
    if text is None:
        raise DataError("perplexity needs a text; pass --text FILE")
    column = params["text_column"]
    documents = read_documents(text, column[0] if column else "text")

    from secateur.jobs.language import harness, rows

    began = time.perf_counter()
    tasks = _tasks(params)
    if tasks is not None:
        harness.check(tasks)
    formats = _formats(context)
    threads = None
    if params["speed"]:
        import torch

        threads = params["threads"] or torch.get_num_threads()
    models = rows.Models(params["model"], params["against"], options, formats, threads)
    found = rows.compare(models, rows.Text(str(text), documents, params["context"], params["samples"]), common.track)
    on_tasks = [] if tasks is None else harness.run_tasks(models, tasks)
    if params["json"]:
        common.print_json(_as_json(params["model"], text, found, on_tasks))
    else:
        show(params["model"], text, found)
        show_tasks(on_tasks)
    if params["report"] is not None:
        from secateur.jobs.records import scored
        from secateur.records.provenance import data_file

        data = [data_file("test", text, len(documents))]
        record = scored(params["model"], found.score, found.rows, data, time.perf_counter() - began)
        common.write_report([record], params["report"])
    if alarm := found.score.collapsed:
        common.note(f"alarm: {params['model']} has collapsed: {alarm}")


def _formats(context: typer.Context) -> tuple[str, ...]:
    """The formats of --quantized; without it, those of 8 and 4 bits if there is a dense model to compare with, and a
    note where the extra that rounds is missing."""
    from secateur.deploy.gguf import quantise
    from secateur.deploy.gguf.export import require
    from secateur.deploy.target import DeployError
    from secateur.jobs.language.rows import FORMATS

    if given(context, "quantized"):
        words = [word.strip().lower() for word in context.params["quantized"].split(",")]
        formats = tuple(dict.fromkeys(word for word in words if word and word != "none"))
        for name in formats:
            quantise.find(name)
        return formats
    if context.params["against"] is None:
        return ()
    try:
        require()
    except DeployError as error:
        common.note(f"no rows at 8 and 4 bits: {error}")
        return ()
    return FORMATS


def _tasks(params: dict[str, Any]) -> "Tasks | None":
    """What --lm-eval asks for."""
    from secateur.errors import DataError
    from secateur.jobs.language.harness import Tasks

    if params["lm_eval"] is None:
        return None
    names = [name.strip() for name in params["lm_eval"].split(",") if name.strip()]
    if not names:
        raise DataError("--lm-eval names no task; pass names with commas between them")
    return Tasks(names, params["lm_eval_path"], params["lm_eval_limit"])


def show(model: str, text: Path, found: "Compared") -> None:
    """The table of all rows, and sentences."""
    from secateur.jobs.language.rows import verdicts
    from secateur.jobs.records import name_of

    columns = ["weights", "MB", "perplexity", "loss", "delta loss [95%]", "KL to dense", "flips"]
    is_timed = any(row.speed for row in found.rows)
    columns += ["prompt tokens/s", "new tokens/s"] if is_timed else []
    first = found.score
    title = f"{name_of(model)} on {text.name}: {first.windows} windows of {first.context} tokens that do not overlap"
    common.print_table(title, columns, [_cells(row, is_timed=is_timed) for row in found.rows])
    for sentence in [*verdicts(found.rows), *found.notes]:
        common.say(sentence)


def _cells(row: "Row", *, is_timed: bool) -> list[str]:
    score = row.score
    cells = [row.name, common.megabytes(row.bytes), f"{score.perplexity:.2f}", f"{score.loss:.4f}"]
    if score.delta is None or score.kl is None or score.flips is None:
        cells += [DASH] * 3
    else:
        cells += [_difference(score.delta, score.interval), f"{score.kl:.4f}", common.percent(score.flips)]
    if is_timed:
        cells += [DASH] * 2 if row.speed is None else [f"{row.speed.prompt:.1f}", f"{row.speed.decode:.1f}"]
    return cells


def _difference(delta: float, interval: tuple[float, float] | None) -> str:
    """With the interval, which a single window or row does not have."""
    return f"{delta:+.4f}" + ("" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]")


def show_tasks(scores: "list[TaskScore]") -> None:
    """The table of tasks of lm-evaluation-harness; nothing without any."""
    if not scores:
        return
    has_dense = any(score.dense is not None for score in scores)
    columns = ["task", "metric", "rows", "this model"]
    columns += ["dense", "difference [95%]"] if has_dense else []
    rows = []
    for one in scores:
        cells = [one.task, one.metric, f"{one.rows:,}", _with_error(one.value, one.stderr)]
        if has_dense:
            cells.append(DASH if one.dense is None else _with_error(one.dense, one.dense_stderr))
            cells.append(DASH if one.delta is None else _difference(one.delta, one.interval))
        rows.append(cells)
    common.print_table("lm-evaluation-harness, value and standard error", columns, rows, left=2)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _as_json(model: str, text: Path, found: "Compared", tasks: "list[TaskScore]") -> dict[str, Any]:
    """The score of the model, and below it all rows."""
    from secateur.jobs.language.rows import verdicts

    rows = []
    for row in found.rows:
        speed = None if row.speed is None else {"prompt": row.speed.prompt, "decode": row.speed.decode}
        rows.append(
            {"name": row.name, "whose": row.whose, "format": row.form, "bytes": row.bytes}
            | {"tokens_per_second": speed, **_numbers(row.score)}
        )
    return {
        "model": model,
        "text": str(text),
        **_numbers(found.score),
        "collapsed": found.score.collapsed,
        "rows": rows,
        "verdicts": verdicts(found.rows),
        "notes": found.notes,
        "tasks": [asdict(score) for score in tasks],
    }


def _numbers(score: "TextScore") -> dict[str, Any]:
    """The figures of a score, without those of single windows."""
    return {name: value for name, value in asdict(score).items() if name not in ("losses", "dense_losses")}
