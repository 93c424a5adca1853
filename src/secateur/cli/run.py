"""secateur run: labels or continuations of texts by a pruned model on the sparse kernels."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.jobs.answer import Answer

NAME = "run"
EXAMPLES = (
    'secateur run ./pruned "a fine film"',
    "secateur run ./pruned --data texts.jsonl --json",
    'secateur run ./decoder "Once upon a time" --new-tokens 40 --value int8 --dense int8',
)
VALUES_HELP = "How kept weights are stored: float32, bfloat16, float16 or int8 (the last two: blocks or few tokens)."
DENSE_HELP = "How layers with few zeros, such as the output layer, are stored for a decoder's steps: values as --value."
ACTIVATIONS_HELP = "int8: layers with 1x4 blocks of zeros round their inputs too (with --value int8)."


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; or pass --data.", metavar="[TEXT]...")] = None,
    *,
    data: common.DataOption = None,
    text_column: common.TextColumnOption = "text",
    split: common.SplitOption = None,
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens that a decoder adds.", min=1)] = 32,
    value: Annotated[str, typer.Option(help=VALUES_HELP)] = "float32",
    activations: Annotated[str, typer.Option(help=ACTIVATIONS_HELP)] = "float32",
    dense: Annotated[str, typer.Option(help=DENSE_HELP)] = "float32",
    measure: Annotated[bool, typer.Option(help="Time each layer dense and sparse and keep the faster.")] = True,
    task: common.TaskOption = None,
    threads: common.ThreadsOption = None,
    json: common.JsonOption = False,
) -> None:
    """Run a pruned model on secateur's sparse kernels: labels of a classifier, or the text a decoder goes on with.

    One sentence on standard error says which layers were sped up, and why others were not.
    """
    from secateur.errors import DataError

    if bool(texts) == (data is not None):
        raise DataError("pass texts, or --data FILE, not both" if texts else "no text; pass texts, or --data FILE")
    lines = list(texts) if texts else list(common.read_data(data, text_column, None, split).texts)

    from secateur import runtime
    from secateur.cli import kinds
    from secateur.jobs.answer import classify, continue_texts, generates
    from secateur.runtime.saving import MANIFEST
    from secateur.torch.data.text_rows import load_tokenizer
    from secateur.torch.open import load_model

    check_types(value, dense, activations)
    common.quiet_libraries()
    common.set_threads(threads)
    tokenizer = load_tokenizer(model)
    compiled = (Path(model) / MANIFEST).exists()
    loaded = runtime.load(model) if compiled else load_model(model, task=task)
    kinds.refuse(context_, f"{'compiled-' if compiled else ''}{'continue' if generates(loaded) else 'answer'}")
    if compiled:
        fast, summary = loaded, "The folder was saved compiled: its layers run as they were packed."
    else:
        options = {"value": value, "activations": activations, "dense": dense, "measure": measure}
        fast, summary = compile_for(loaded, tokenizer, lines[:batch_size], max_length, batch_size, options)
    if generates(fast):
        answers = continue_texts(fast, tokenizer, lines, max_length, new_tokens)
    else:
        answers = classify(fast, tokenizer, lines, max_length, batch_size)
    show(answers, model, summary, json=json)


def check_types(value: str, dense: str, activations: str) -> None:
    """DataError for a type that is unknown, or that does not go with the others."""
    from secateur.errors import DataError
    from secateur.kernels.format import VALUES, check_activations

    for option, name in (("value", value), ("dense", dense)):
        if name not in VALUES:
            raise DataError(f"--{option} {name} is unknown; use one of {', '.join(VALUES)}")
    try:
        check_activations(value, activations)
    except ValueError as error:
        raise DataError(str(error)) from error


def compile_for(
    model: Any, tokenizer: Any, lines: list[str], max_length: int, batch_size: int, options: dict[str, Any]
) -> tuple[Any, str]:
    """The model on the sparse kernels, and a sentence that says what was sped up.

    lines: the first batch of texts, on which the model is traced. options: of `secateur.runtime.compile`.
    """
    from secateur import runtime
    from secateur.errors import ModelError
    from secateur.jobs.answer import batch_of, generates

    length = min(max_length, 128)
    tokens = (1, length) if generates(model) else batch_size * length
    untraced = ""
    try:
        example = batch_of(model, tokenizer, lines, max_length)
        fast = runtime.compile(model, tokens=tokens, example=example, **options)
    except ModelError as error:
        fast = runtime.compile(model, tokens=tokens, **options)
        untraced = f" Nothing was fused: {error}"
    return fast, fast.secateur_report.summary() + untraced


def show(answers: Sequence["Answer"], model: str, summary: str, *, json: bool) -> None:
    """Print a label or the text that goes on, for each text."""
    if json:
        values = [{k: v for k, v in asdict(answer).items() if v is not None} for answer in answers]
        common.print_json({"model": model, "summary": summary, "answers": values})
        return
    common.note(summary)
    for answer in answers:
        if answer.generated is not None:
            common.say(answer.text + answer.generated)
        else:
            common.say(f"{answer.label}\t{answer.probability:.3f}\t{answer.text}")
