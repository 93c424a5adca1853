"""secateur prune with a schedule of tokens: alone, or on a model from which units or weights were pruned."""

from typing import TYPE_CHECKING, Any

import typer

from secateur.cli import common, kinds
from secateur.cli.pruning.reports import of_folder

if TYPE_CHECKING:
    from secateur.jobs.schedule_tokens import Scheduled, Wanted
    from secateur.torch.host import TorchHost

OPTIONS = ("tokens", "keep", "merge")
"""Options of `prune` that give a schedule."""
CHOOSING = ("criterion", "pattern", "sparsity", "threshold", "budget", "sweep", "sweep_by")
"""Options that prune units or weights; without any of them the schedule is all that is asked for."""


def is_alone(context: typer.Context) -> bool:
    """Whether the command line asks for a schedule of tokens and for nothing else."""
    asked = any(context.params[name] is not None for name in OPTIONS)
    return asked and not any(kinds.given(context, name) for name in CHOOSING)


def wanted_of(params: dict[str, Any]) -> "Wanted | None":
    """The schedule that the options ask for.

    Raises PlanError for two of them and beside --uniform, ModelError for what is no schedule.
    """
    from secateur.errors import PlanError

    given = [name for name in OPTIONS if params[name] is not None]
    if len(given) > 1:
        raise PlanError(f"--{given[0]} and --{given[1]} exclude each other; pass one")
    if not given:
        return None
    if params["uniform"]:
        raise PlanError(
            "--uniform demands a stock checkpoint, which holds no schedule of tokens; leave out --uniform or "
            f"--{given[0]}"
        )
    from secateur.jobs.schedule_tokens import Wanted

    return Wanted(params[given[0]], merges=given[0] == "merge")


def refuse(context: typer.Context, what: str) -> None:
    """PlanError where a schedule is asked for in a run that gives none. what: the run, as the start of a sentence."""
    from secateur.errors import PlanError

    given = next((name for name in OPTIONS if context.params[name] is not None), None)
    if given is not None:
        words = context.params[given]
        raise PlanError(
            f"{what} gives no schedule of tokens; leave out --{given}, and give it to the folder that is written: "
            f"secateur prune FOLDER --{given} {words} --output OTHER"
        )


def did(context: typer.Context) -> bool:
    """Do what the command line asks for where that is a schedule of tokens alone; whether it was.

    Raises ModelError where a schedule is asked for a .keras file, alone or not.
    """
    from secateur.errors import ModelError
    from secateur.find_host import is_keras_file

    model = context.params["model"]
    if is_keras_file(model) and any(context.params[name] is not None for name in OPTIONS):
        raise ModelError(
            f"{model} is a .keras file, which shows no attention of its blocks; tokens are pruned in PyTorch models of "
            "transformers"
        )
    if not is_alone(context):
        return False
    run(context)
    return True


def run(context: typer.Context) -> None:
    """Give the model a schedule, write it, and show what was done."""
    params = context.params
    kinds.refuse(context, "tokens")
    common.refuse_torchrun("a schedule of tokens is given")
    wanted = wanted_of(params)
    assert wanted is not None
    common.claim_output(params["output"], overwrite=params["overwrite"])
    common.claim_report(params["report"], params["output"], overwrite=params["overwrite"])
    common.quiet_libraries()
    common.set_threads(params["threads"])

    from secateur.jobs.open_task import look, open_host
    from secateur.jobs.schedule_tokens import run as give
    from secateur.records.provenance import data_file

    task = test = None
    files = []
    if params["data"] is None:
        host = _without_task(params)
    else:
        table = common.read_data(params["data"], params["split"])
        opened = look(params["model"], params["task"], trust_remote_code=params["trust_remote_code"])
        host, task = open_host(opened, common.task_options(params), common.read_layout(params["layout_file"]))
        test = task.batches(table, params["batch_size"])
        files = [data_file("test", table.source, len(table))]
        for sentence in task.notes:
            common.note(sentence)
    done = give(
        host,
        wanted,
        params["output"],
        task=task,
        test=test,
        files=files,
        overwrite=params["overwrite"],
        track=common.track,
    )
    show(done, json=params["json"])
    common.write_report(of_folder(params["output"], task, test, done.dense, done.pruned), params["report"])


def _without_task(params: dict[str, Any]) -> "TorchHost":
    """The model as its config names it, or of --task; no processor is needed, as nothing is measured."""
    from secateur.tasks.find import auto_class
    from secateur.torch.open import open_folder

    options: dict[str, Any] = {"trust_remote_code": True} if params["trust_remote_code"] else {}
    loads = auto_class(params["model"], params["task"], **options)
    return open_folder(params["model"], task=loads, layout=common.read_layout(params["layout_file"]), **options)


def show(done: "Scheduled", *, json: bool) -> None:
    """Print the result of a run without any other pruning."""
    from secateur.cli.pruning import outcomes

    if json:
        common.print_json(done.as_json())
        return
    if done.dense is not None and done.pruned is not None and done.drop is not None:
        title = f"{done.folder}: {done.dense.rows} rows, {done.dense.task}"
        outcomes.show_stages(title, [("dense", done.dense), ("fewer tokens", done.pruned)])
        outcomes.show_drop(done.drop)
    outcomes.say_schedule(done.folder, done.schedule)
    common.say(f"{common.megabytes(done.bytes)} MB on disk; reloaded logits equal")
    if done.dense is None:
        common.say("no data was given, so nothing was measured: secateur eval compares both models (--against)")
