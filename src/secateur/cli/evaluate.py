"""secateur eval: accuracy or perplexity of a saved model, and how far it is from another one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.scores import Score

NAME = "eval"
EXAMPLES = (
    "secateur eval ./pruned --data test.csv --text-column text --label-column label --against ./dense",
    "secateur eval ./sparse-llm --task perplexity --text news.txt --context 2048 --reference ./dense-llm",
)
PERPLEXITY = "perplexity"
LANGUAGE = "Language models"


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    *,
    data: common.DataOption = None,
    text_column: common.TextColumnOption = "text",
    label_column: common.LabelColumnOption = "label",
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
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 32,
    task: Annotated[
        str | None,
        typer.Option(
            help="[bold]perplexity[/], or load as AutoModelFor[bold]TASK[/]; default: the class the folder names.",
            rich_help_panel=common.MODEL_PANEL,
        ),
    ] = None,
    threads: common.ThreadsOption = None,
    check: common.CheckOption = False,
    trust_remote_code: common.RemoteCodeOption = False,
    json: common.JsonOption = False,
) -> None:
    """Score a model on labelled texts, or a language model on plain text with --task perplexity.

    The data of a `.keras` classifier is an .npz of x and y.
    """
    from secateur.cli import kinds
    from secateur.find_host import is_keras_file

    kinds.refuse(context_, PERPLEXITY if task == PERPLEXITY else "keras" if is_keras_file(model) else "labels")
    if check:
        common.check_unchanged(model)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if task == PERPLEXITY:
        from secateur.cli import language

        common.quiet_libraries()
        common.set_threads(threads)
        language.evaluate(
            model,
            text,
            text_column=text_column,
            context=context,
            reference=against,
            samples=samples,
            options=options,
            json=json,
        )
        return
    if is_keras_file(model):
        from secateur.cli import keras

        show(model, keras.evaluate(model, data, against, batch_size, threads), json=json)
        return
    rows = common.read_data(data, text_column, label_column, split)

    from secateur.jobs.text_classifier import evaluate, logits
    from secateur.torch.data.text_rows import Batches, encode, load_tokenizer
    from secateur.torch.host import TorchHost
    from secateur.torch.open import load_model

    common.quiet_libraries()
    common.set_threads(threads)
    host = TorchHost.untraced(load_model(model, task=task, **options))
    tokenizer = load_tokenizer(model, **options)
    batches = Batches(encode(host.model, tokenizer, rows, max_length), tokenizer, batch_size)
    dense = None
    if against is not None:
        reference = TorchHost.untraced(load_model(against, task=task, **options))
        dense = logits(reference, common.track(batches, "dense model"))
    show(model, evaluate(host, batches, dense, common.track), json=json)


def show(model: str, result: "Score", *, json: bool) -> None:
    """Print one row of scores."""
    from dataclasses import asdict

    if json:
        common.print_json({"model": model, **asdict(result)})
        return
    columns, row = ["model", "examples", "accuracy", "loss"], [model, str(result.examples)]
    row += [f"{result.accuracy:.4f}", f"{result.loss:.4f}"]
    if result.kl is not None and result.flips is not None:
        columns += ["KL to dense", "flips"]
        row += [f"{result.kl:.4f}", common.percent(result.flips)]
    common.print_table("Evaluation", columns, [row])
