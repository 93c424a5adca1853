"""secateur prune with a target: the search, and how its result is shown."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli import common, progress

if TYPE_CHECKING:
    from secateur.search.points import Found, Point
    from secateur.search.rows import Rows
    from secateur.search.target import Target
    from secateur.tasks.base.task import Task
    from secateur.torch.host import TorchHost

OPTIONS = ("speed_up", "target", "max_drop", "max_divergence", "frontier")
"""Options of `prune` that ask for a search."""
STAGES = {
    "dense model": "dense model",
    "statistics": "statistics of the calibration rows",
    "levels": "what each axis loses at each size",
    "costs": "times of the dense and of smaller models",
    "choice": "choice of the sizes",
    "ranking": "short training of the best choices",
    "search": "local search",
    "measurement": "measurement of the result",
    "evaluation": "evaluation on the test rows",
    "healing": "training with the dense model as teacher",
}
"""Stages of a search -> what they are for people. Some come again for every model."""
TRAINED = ("ranking", "healing")
"""Those that come where a model may be trained."""
MISSED = 1
"""Exit code when the target is missed."""
_TIMES = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def is_asked(context: typer.Context) -> bool:
    """Whether an option asks for a search."""
    return any(context.params[name] not in (None, [], ()) for name in OPTIONS)


def run(context: typer.Context) -> None:
    """Search for the model that the options of `prune` ask for, write it, and show what was found.

    Raises typer.Exit with code `MISSED` where the target is missed.
    """
    from secateur.cli import kinds
    from secateur.cli.pruning import streamed, tokens
    from secateur.cli.pruning.choice import needed
    from secateur.errors import PlanError
    from secateur.find_host import is_keras_file

    params = context.params
    tokens.refuse(context, "a search for a target")
    kinds.refuse(context, "automatic" if params["memory"] is None else "streamed")
    if params["model"] is None or params["output"] is None:
        raise PlanError(needed("a model" if params["model"] is None else "--output FOLDER"))
    if is_keras_file(params["model"]):
        raise PlanError(
            "a .keras file has no statistics for a search yet; choose --criterion, --pattern and --sparsity yourself"
        )
    common.refuse_torchrun("a search is run")
    if params["memory"] is not None:
        streamed.prune(params, target_of(params))
        return
    target, speeds = target_of(params), numbers(params["frontier"])
    heal, search = (seconds_of(params[f"{name}_budget"], f"--{name}-budget") for name in ("heal", "search"))
    common.claim_output(params["output"], overwrite=params["overwrite"])
    common.claim_report(params["report"], params["output"], overwrite=params["overwrite"])
    common.quiet_libraries()

    from secateur.search.journal import work_folder
    from secateur.search.walk import automatic

    host, task, rows = _opened(params)
    progress.current().stages(*(words for name, words in STAGES.items() if heal or name not in TRAINED))
    found = automatic(
        host,
        task,
        target,
        rows,
        params["output"],
        frontier=speeds,
        heal_seconds=heal,
        search_seconds=search,
        seed=params["seed"],
        work=work_folder(host, task, rows),
        overwrite=params["overwrite"],
        save_options={"uniform": params["uniform"]},
        track=progress.track,
        say=progress.say,
        stage=lambda name: progress.stage(STAGES.get(name, name)),
        best=progress.best,
    )
    if speeds and found.folder is not None:
        from secateur.report.plots import plot_frontier

        plot_frontier(found, found.folder / "frontier.png", f"{params['model']} on {params['on']}")
    show(found, json=params["json"])
    if params["report"] is not None:
        from secateur.cli.pruning.reports import of_search

        common.write_report(of_search(found, task, rows), params["report"])
    if not found.is_met:
        raise typer.Exit(MISSED)


def _opened(params: dict[str, Any]) -> "tuple[TorchHost, Task, Rows]":
    """The model with its task, and the rows of its data."""
    from secateur.cli.pruning.language import table_of
    from secateur.jobs.open_task import look, open_host, prepare_search

    opened = look(params["model"], params["task"], trust_remote_code=params["trust_remote_code"])
    options = common.task_options(params)
    if params["calibration"]:
        table, options = table_of(params["calibration"]), replace(options, max_length=params["context"])
    else:
        table = common.read_data(params["data"], params["split"])
    held_out = common.held_out(params)
    host, task = open_host(opened, options, common.read_layout(params["layout_file"]))
    rows = prepare_search(
        task,
        table,
        held_out,
        calibration_samples=params["samples" if params["calibration"] else "calibration_samples"],
        batch_size=params["batch_size"],
        seed=params["seed"],
        say=common.note,
    )
    return host, task, rows


def target_of(params: dict[str, Any]) -> "Target":
    """The target that the options ask for; TargetError where they contradict each other."""
    from secateur.search.target import make_target

    return make_target(
        params["speed_up"],
        params["on"],
        params["target"] or (),
        params["max_drop"],
        params["max_divergence"],
        confident=params["confident"],
        closest=params["closest"],
        zeros=params["zeros"],
        frontier=numbers(params["frontier"]),
        batch=params["batch"],
        length=params["length"],
        threads=params["threads"] or 1,
        quantize=params["quantize"],
        reader=params["reader"],
        round=params["round"],
    )


def numbers(text: str | None) -> list[float]:
    """The speed-ups of --frontier; TargetError for what is no number above 1."""
    from secateur.errors import TargetError

    if text is None:
        return []
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 1:
        raise TargetError(f"--frontier {text} is no list of speed-ups above 1; write it like 1.5,2,3")
    return found


def seconds_of(text: str, option: str) -> float:
    """Seconds of a duration such as 30min, 90s or 2h; 0 for none. TargetError for anything else."""
    from secateur.errors import TargetError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or (found[2] not in _TIMES and float(found[1])):
        raise TargetError(f"{option} {text} is no duration; write it like 30min, 90s or 2h, or 0 for none")
    return float(found[1]) * _TIMES.get(found[2], 0.0)


def show(found: "Found", *, json: bool) -> None:
    """Print what was found: the sentence, and a table of the points that were measured."""
    if json:
        common.print_json(found.as_json())
        return
    common.say(found.reading)
    if found.points:
        metric = found.points[0].drop.metric
        dense = found.points[0].drop.dense
        common.print_table(
            f"{metric} {dense:.4f} dense, on {found.points[0].drop.rows:,} test rows",
            ["model", "speed-up", metric, "drop", "95%", "pruned only", "divergence", "parameters"],
            [_row(point) for point in (*found.points, *found.baselines)],
        )
    if found.folder is not None:
        common.say(f"{found.folder}: `from_pretrained` opens it; secateur-search.json says what was measured")
    elif found.best is not None:
        common.say("nothing was written; --closest writes the nearest model")


def _row(point: "Point") -> tuple[str, ...]:
    interval = point.drop.interval
    return (
        point.name,
        "-" if point.speed_up is None else f"{point.speed_up:.2f}x",
        f"{point.drop.pruned:.4f}",
        f"{point.lost:+.4f}",
        "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
        f"{point.pruned.value:.4f}",
        "-" if point.final.kl is None else f"{point.final.kl:.4f}",
        f"{point.parameters[0] / point.parameters[1]:.1%}",
    )
