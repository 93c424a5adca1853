"""secateur run: texts through a pruned model on the sparse kernels."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

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
    from secateur.errors import DataError, ModelError

    if bool(texts) == (data is not None):
        raise DataError("pass texts, or --data FILE, not both" if texts else "no text; pass texts, or --data FILE")
    lines = list(texts) if texts else list(common.read_data(data, text_column, None, split).texts)

    from dataclasses import asdict
    from functools import partial

    from secateur import runtime
    from secateur.cli import kinds
    from secateur.jobs.answer import batch_of, classify, continue_texts, generates
    from secateur.kernels.format import VALUES, check_activations
    from secateur.runtime.saving import MANIFEST
    from secateur.torch.data.text_rows import load_tokenizer
    from secateur.torch.open import load_model

    for name, given in (("value", value), ("dense", dense)):
        if given not in VALUES:
            raise DataError(f"--{name} {given} is unknown; use one of {', '.join(VALUES)}")
    try:
        check_activations(value, activations)
    except ValueError as error:
        raise DataError(str(error)) from error
    common.quiet_libraries()
    common.set_threads(threads)
    tokenizer = load_tokenizer(model)
    compiled = (Path(model) / MANIFEST).exists()
    loaded = runtime.load(model) if compiled else load_model(model, task=task)
    kinds.refuse(context_, f"{'compiled-' if compiled else ''}{'continue' if generates(loaded) else 'answer'}")
    if compiled:
        fast = loaded
        summary = "The folder was saved compiled: its layers run as they were packed."
    else:
        whole = batch_size * min(max_length, 128)
        tokens = (1, min(max_length, 128)) if generates(loaded) else whole
        stored = partial(runtime.compile, value=value, activations=activations, dense=dense)
        compile = partial(stored, loaded, tokens=tokens, measure=measure)
        untraced = ""
        try:
            fast = compile(example=batch_of(loaded, tokenizer, lines[:batch_size], max_length))
        except ModelError as error:
            fast, untraced = compile(), f" Nothing was fused: {error}"
        summary = fast.secateur_report.summary() + untraced
    if generates(fast):
        answers = continue_texts(fast, tokenizer, lines, max_length, new_tokens)
    else:
        answers = classify(fast, tokenizer, lines, max_length, batch_size)
    if json:
        answered = [{k: v for k, v in asdict(answer).items() if v is not None} for answer in answers]
        common.print_json({"model": model, "summary": summary, "answers": answered})
        return
    common.note(summary)
    for answer in answers:
        if answer.generated is not None:
            typer.echo(answer.text + answer.generated)
        else:
            typer.echo(f"{answer.label}\t{answer.probability:.3f}\t{answer.text}")
