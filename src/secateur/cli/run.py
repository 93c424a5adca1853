"""secateur run: what a pruned model answers to texts, images or sounds, on the sparse kernels."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.jobs.answer import Answer

NAME = "run"
EXAMPLES = (
    'secateur run ./pruned "a fine film"',
    'secateur run ./reader "Who wrote it?" "It was written by Ada."',
    "secateur run ./eye photo.png another.png",
    "secateur run ./pruned --data texts.jsonl --json",
    'secateur run ./decoder "Once upon a time" --new-tokens 40 --value int8 --dense int8',
    'secateur run ./decoder-gguf "Once upon a time" --new-tokens 40',
)
VALUES_HELP = "How kept weights are stored: float32, bfloat16, float16 or int8 (the last two: blocks or few tokens)."
DENSE_HELP = "How layers with few zeros, such as the output layer, are stored for a decoder's steps: values as --value."
ACTIVATIONS_HELP = "int8: layers with 1x4 blocks of zeros round their inputs too (with --value int8)."


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, or files of images or sounds; question and context in turn; or pass --data.",
            metavar="[TEXT or FILE]...",
        ),
    ] = None,
    *,
    data: common.DataOption = None,
    text_column: common.TextColumnOption = None,
    image_column: common.ImageColumnOption = None,
    audio_column: common.AudioColumnOption = None,
    split: common.SplitOption = None,
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(help="Most tokens that a model writes.", min=1)] = 32,
    value: Annotated[str, typer.Option(help=VALUES_HELP)] = "float32",
    activations: Annotated[str, typer.Option(help=ACTIVATIONS_HELP)] = "float32",
    dense: Annotated[str, typer.Option(help=DENSE_HELP)] = "float32",
    measure: Annotated[bool, typer.Option(help="Time each layer dense and sparse and keep the faster.")] = True,
    task: common.TaskOption = None,
    threads: common.ThreadsOption = None,
    json: common.JsonOption = False,
) -> None:
    """Run a pruned model on secateur's sparse kernels: what it answers, or the text that a decoder goes on with.

    One sentence on standard error says which layers were sped up, and why others were not.
    """
    from secateur.errors import DataError

    if bool(inputs) == (data is not None):
        raise DataError(
            "pass texts or files, or --data FILE, not both" if inputs else "no text or file; pass some, or --data FILE"
        )
    table = None if data is None else common.read_data(data, split)

    from secateur.cli import kinds
    from secateur.deploy.gguf.generate import is_gguf
    from secateur.jobs.answer import answers_of_gguf, compiled, generates, open_to_answer

    common.quiet_libraries()
    if is_gguf(model):
        kinds.refuse(context_, "llama")
        given = table or list(inputs or ())
        answers, found = answers_of_gguf(model, given, common.task_options(context_.params), threads or 1)
        for sentence in found:
            common.note(sentence)
        show(answers, model, "llama.cpp goes on with the texts.", json=json)
        return
    check_types(value, dense, activations)
    common.set_threads(threads)
    opened = open_to_answer(model, task)
    kind = "continue" if opened.task is None else "write" if generates(opened.model) else "answer"
    kinds.refuse(context_, f"compiled-{kind}" if opened.is_compiled else kind)
    rows = opened.rows(table or list(inputs or ()), common.task_options(context_.params))
    for sentence in rows.notes:
        common.note(sentence)
    settings = {"value": value, "activations": activations, "dense": dense, "measure": measure}
    fast, summary = compiled(opened, rows, batch_size, settings)
    show(rows.answers(fast, batch_size), model, summary, json=json)


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


def show(answers: Sequence["Answer"], model: str, summary: str, *, json: bool) -> None:
    """Print what the model answers to each input, or the input and how it goes on."""
    if json:
        values = [{"input": answer.input, "ms": answer.ms, **answer.shown} for answer in answers]
        common.print_json({"model": model, "summary": summary, "answers": values})
        return
    common.note(summary)
    for answer in answers:
        if "generated" in answer.shown:
            common.say(answer.input + answer.shown["generated"])
        else:
            common.say("\t".join([*map(words, _said(answer.shown)), answer.input]))


POSITIONS = ("start", "end")
"""Parts of an answer that say where it stands, for programs."""


def _said(parts: Mapping[str, Any]) -> list[Any]:
    """What a person wants to see of an answer."""
    return [value for name, value in parts.items() if name not in POSITIONS]


def words(value: Any) -> str:
    """A part of an answer on a line: entities with semicolons between them, numbers of a vector with blanks."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, float) for part in value):
            return " ".join(f"{part:.4f}" for part in value)
        return "; ".join(map(_words_of_part, value)) or "none"
    return str(value)


def _words_of_part(part: Any) -> str:
    """One of several: its values without their names."""
    if isinstance(part, Mapping):
        return " ".join(map(words, _said(part)))
    return " ".join(map(words, part)) if isinstance(part, list | tuple) else words(part)
