"""secateur eval: accuracy or perplexity of a saved model, and how far it is from another one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common
from secateur.cli.shell import complete

NAME = "eval"
EXAMPLES = (
    "secateur eval ./pruned --data test.csv --text-column text --label-column label --against ./dense",
    "secateur eval ./sparse-llm --task perplexity --text news.txt --context 2048 --reference ./dense-llm",
    "secateur eval ./small-llm --task perplexity --text news.txt --context 256 --reference ./dense-llm --speed",
    "secateur eval ./small-llm --task perplexity --text news.txt --reference ./dense-llm --lm-eval my_task "
    "--lm-eval-path ./tasks",
)
PERPLEXITY = "perplexity"
LANGUAGE = "Language models"


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    *,
    data: common.DataOption = None,
    text_column: common.TextColumnOption = None,
    label_column: common.LabelColumnOption = None,
    target_column: common.TargetColumnOption = None,
    image_column: common.ImageColumnOption = None,
    audio_column: common.AudioColumnOption = None,
    label_names: common.LabelNamesOption = None,
    split: common.SplitOption = None,
    against: Annotated[
        str | None,
        typer.Option("--against", "--reference", help="The dense model: adds KL and the share of changed answers."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for --task perplexity (.txt, or a table).", rich_help_panel=LANGUAGE)
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.", min=2, rich_help_panel=LANGUAGE)] = 2048,
    samples: Annotated[
        int | None, typer.Option(help="The first windows only; default: all.", min=1, rich_help_panel=LANGUAGE)
    ] = None,
    quantized: Annotated[
        str,
        typer.Option(
            help="Formats of GGUF in which both models are scored too: names of `export --quantize` with commas "
            "between them, or none. Without --reference: none.",
            rich_help_panel=LANGUAGE,
        ),
    ] = "q8_0,q4_0",
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Time all rows on llama.cpp, in turn.", rich_help_panel=LANGUAGE),
    ] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of lm-evaluation-harness to run too, with commas between them.",
            metavar="TASKS",
            rich_help_panel=LANGUAGE,
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(
            "--lm-eval-path",
            help="Folder with the tasks as YAML; default: the harness's own tasks, whose rows it fetches from the hub.",
            metavar="FOLDER",
            rich_help_panel=LANGUAGE,
        ),
    ] = None,
    lm_eval_limit: Annotated[
        int | None,
        typer.Option(
            "--lm-eval-limit", help="The first rows of each task only; default: all.", min=1, rich_help_panel=LANGUAGE
        ),
    ] = None,
    max_length: common.LengthOption = 128,
    new_tokens: common.NewTokensOption = 64,
    batch_size: common.BatchOption = 32,
    task: Annotated[
        str | None,
        typer.Option(
            help="[bold]perplexity[/], or what the model is for (text-classification, ...); default: as its config.",
            rich_help_panel=common.MODEL_PANEL,
            autocompletion=complete.one_of(("perplexity", *complete.TASKS)),
        ),
    ] = None,
    threads: common.ThreadsOption = None,
    check: common.CheckOption = False,
    trust_remote_code: common.RemoteCodeOption = False,
    report: common.ReportOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Score a model of any task, with --against next to the dense model; without labels --against is needed.

    The data of a `.keras` classifier is an .npz of x and y. With --task perplexity, a language model and the dense one
    are scored on a text as they are and with weights rounded to 8 and 4 bits as llama.cpp stores them.
    """
    from secateur.cli import kinds
    from secateur.cli.pruning import outcomes
    from secateur.find_host import is_keras_file

    kinds.refuse(context_, PERPLEXITY if task == PERPLEXITY else "keras" if is_keras_file(model) else "labels")
    common.claim_report(report, overwrite=overwrite)
    if check:
        common.check_unchanged(model)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if task == PERPLEXITY:
        from secateur.cli.pruning import scores

        common.quiet_libraries()
        common.set_threads(threads)
        scores.evaluate(context_, options)
        return
    if is_keras_file(model):
        from secateur.cli import keras

        shown = keras.evaluate(model, data, against, batch_size, threads)
        outcomes.show_evaluation(model, *shown, json=json)
        if report is not None:
            from secateur.jobs.records import evaluated

            common.write_report([evaluated(model, *shown)], report)
        return
    table = common.read_data(data, split)

    from secateur.jobs.open_task import look
    from secateur.metrics.evaluation import compare
    from secateur.tasks.base.evaluate import Reference, evaluate

    common.quiet_libraries()
    common.set_threads(threads)
    opened = look(model, task, trust_remote_code=trust_remote_code)
    network = opened.model()
    its_task = opened.of(network, common.task_options(context_.params))
    rows = its_task.batches(table, batch_size)
    for sentence in its_task.notes:
        common.note(sentence)
    reference = None
    if against is not None:
        dense = look(against, opened.task.name, trust_remote_code=trust_remote_code).model()
        reference = Reference(its_task, dense, rows, common.track)
    result = evaluate(its_task, network, rows, reference, common.track)
    drop = None if reference is None else compare(reference.evaluation(), result)
    outcomes.show_evaluation(model, result, drop, json=json)
    if report is None:
        return
    from secateur.jobs.records import evaluated
    from secateur.records.provenance import data_file
    from secateur.tasks.base.disagreements import disagreements

    record = evaluated(
        model,
        result,
        drop,
        dense=None if reference is None else reference.evaluation(),
        examples=[] if reference is None else disagreements(its_task, rows.examples, reference.predictions, result),
        data=[data_file("test", table.source, len(table))],
    )
    common.write_report([record], report)
