"""Shared by the commands: option types, tables, and opening the model and the data that options name."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import kinds, progress
from secateur.cli.progress import note as note
from secateur.cli.progress import track as track
from secateur.cli.shell import complete
from secateur.errors import printable
from secateur.training import ranks

if TYPE_CHECKING:
    from secateur.data.table import Table
    from secateur.layout import Layout
    from secateur.schemas.record import Record
    from secateur.tasks.base.task import Options

MODEL_PANEL, DATA_PANEL, OUTPUT_PANEL, TRAINING_PANEL = "Model", "Data", "Output", "Fine-tuning"
TARGET_PANEL, OTHER_PANEL = "More on a target", "Other"

ModelArgument = Annotated[
    str, typer.Argument(help="A model folder, a hub id such as org/name, or a .keras file.", metavar="MODEL")
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="What the model is for, e.g. text-classification or question-answering; default: what its config says.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=complete.one_of(complete.TASKS),
    ),
]
RemoteCodeOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL_PANEL),
]
LayoutFileOption = Annotated[
    Path | None,
    typer.Option(
        help="Layout written by hand, for a model that cannot be exported; `secateur inspect MODEL --layout` prints "
        "one to start from.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DATA_HELP = (
    "CSV, TSV, JSON lines, Parquet, text, a datasets folder, a folder of images or sounds, or the name of a data set "
    "of the hub; .npz for a .keras file."
)
DataOption = Annotated[str | None, typer.Option(help=DATA_HELP, rich_help_panel=DATA_PANEL)]


def _column_option(role: str) -> Any:
    return typer.Option(help=f"Column with {role}; default: found by its usual name.", rich_help_panel=DATA_PANEL)


TextColumnOption = Annotated[list[str] | None, _column_option("the texts, two for pairs (premise,hypothesis)")]
LabelColumnOption = Annotated[list[str] | None, _column_option("the labels, tags or numbers")]
TargetColumnOption = Annotated[str | None, _column_option("what the model should write or answer")]
ImageColumnOption = Annotated[str | None, _column_option("the images")]
AudioColumnOption = Annotated[str | None, _column_option("the sounds")]
LabelNamesOption = Annotated[
    str | None,
    typer.Option(
        help="Names of the classes in the order of the head, e.g. neg,pos, for a head that names none.",
        rich_help_panel=DATA_PANEL,
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a datasets folder.", rich_help_panel=DATA_PANEL)]
LengthOption = Annotated[int, typer.Option(help="Longest text in tokens.", min=2, rich_help_panel=DATA_PANEL)]
NewTokensOption = Annotated[
    int, typer.Option(help="Most tokens that an encoder-decoder writes.", min=1, rich_help_panel=DATA_PANEL)
]
BatchOption = Annotated[int, typer.Option(help="Examples in a batch.", min=1, rich_help_panel=DATA_PANEL)]
SeedOption = Annotated[
    int, typer.Option(help="Seed of splits and training.", min=0, max=2**32 - 1, rich_help_panel=DATA_PANEL)
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads; default: torch's.", min=1, rich_help_panel=OTHER_PANEL)
]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="Compare MODEL with the SHA-256 of its files first.", rich_help_panel=MODEL_PANEL),
]
RoundOption = Annotated[
    int,
    typer.Option(
        min=1, help="Keep feed-forward neurons in multiples of this, such as 32.", rich_help_panel=TARGET_PANEL
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        help="How weights are stored on llama.cpp: q8_0 (default), f16, q4_k_m, q4_0 and others of `export`.",
        rich_help_panel=TARGET_PANEL,
    ),
]
ReaderOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="The server that has to read the result: vllm, sglang, mlx or llama.cpp; other sizes are not chosen.",
        rich_help_panel=TARGET_PANEL,
        autocompletion=complete.one_of(complete.READERS),
    ),
]
ZerosOption = Annotated[
    bool,
    typer.Option(
        "--zeros",
        help="Let single zeros go beside units; for the runtimes that run zeros fast (secateur).",
        rich_help_panel=TARGET_PANEL,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.", rich_help_panel=OUTPUT_PANEL)]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show no progress.", callback=progress.be_quiet, rich_help_panel=OUTPUT_PANEL),
]
TrainArgsOption = Annotated[
    Path | None,
    typer.Option(
        help="YAML or JSON with fields of transformers' TrainingArguments, such as gradient_accumulation_steps, bf16, "
        "report_to, output_dir and save_strategy (the same command then goes on from the last checkpoint). Options "
        "given here win over its epochs, learning rate, batch size and seed; it wins over their defaults.",
        rich_help_panel=TRAINING_PANEL,
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        help="HTML page to write: what was asked and what was measured, with charts.",
        metavar="FILE",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT_PANEL)
]


def say(text: str = "") -> None:
    """Text on standard output, whatever file it comes from; line breaks and tabs stay."""
    typer.echo(printable(text, keep="\n\t"))


def print_json(value: Any) -> None:
    """A result for programs, on standard output; what a terminal would not show is escaped as JSON does it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """A table on standard output; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def quiet_libraries() -> None:
    """Keep messages of transformers and datasets off the terminal; secateur prints what matters."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ModuleNotFoundError):
        import datasets

        datasets.disable_progress_bars()


def set_threads(threads: int | None) -> None:
    """Pin torch to a number of CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_unchanged(model: str) -> None:
    """Compare the folder of --check with its hashes, and say so; ModelError when a file has changed."""
    from secateur.torch.files.saving import check_unchanged

    note(f"{check_unchanged(model)} files of {model} are those that were saved")


def read_layout(path: Path | None) -> "Layout | None":
    """The layout of a file, or None without one; LayoutError when it cannot be read."""
    from secateur.errors import LayoutError
    from secateur.layout import Layout

    if path is None:
        return None
    try:
        return Layout.from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(
            f"the layout file {path} cannot be read: {error}; `secateur inspect MODEL --layout > {path}` writes one"
        ) from None


def read_data(source: str | None, split: str | None) -> "Table":
    """The rows of the --data option."""
    from secateur.data.read import read_table
    from secateur.errors import DataError

    if source is None:
        raise DataError(
            "data is needed here; pass --data rows.csv (or another table, a folder, or a data set of the hub) with "
            "the columns that the task reads, such as text and label"
        )
    return read_table(source, split)


def check_splits(params: dict[str, Any]) -> None:
    """DataError where --split and --eval-split of one data set are the same."""
    from secateur.errors import DataError

    split, other = params["split"], params["eval_split"]
    if other is not None and params["eval_data"] is None and other == split:
        raise DataError(f"--split and --eval-split are both {split!r}; report on rows that were not trained on")


def held_out(params: dict[str, Any]) -> "Table | None":
    """The rows to report on that --eval-data and --eval-split name; None where some of --data are to be held out."""
    if not (params["eval_data"] or params["eval_split"]):
        return None
    return read_data(params["eval_data"] or params["data"], params["eval_split"])


def claim_output(path: Path, *, overwrite: bool) -> None:
    """Check and claim an output, once among the processes of `torchrun`; SecateurError as `check_output` has it."""
    from secateur.files import check_output

    if ranks.is_first():
        check_output(path, overwrite=overwrite)


def claim_report(path: Path | None, output: Path | None = None, *, overwrite: bool) -> None:
    """Check and claim the file of --report; a file inside `output`, which is claimed already, lies in a new folder.

    Raises SecateurError as `check_output` does, and where a package that reports need is missing.
    """
    if path is None:
        return
    from secateur.report.bundle import check_packages

    check_packages()
    if output is None or not path.absolute().is_relative_to(output.absolute()):
        claim_output(path, overwrite=overwrite)


def write_report(records: "Sequence[Record]", path: Path | None) -> None:
    """Write the page of --report, and say so; nothing without the option. `claim_report` has claimed the file."""
    if path is None:
        return
    if not records:
        note(f"{path} was not written, as no model was made")
        return
    from secateur.report.page import write_report

    note(f"{write_report(records, path, overwrite=True)} shows what was measured")


def refuse_torchrun(what: str) -> None:
    """PlanError under `torchrun` for what one process does."""
    from secateur.errors import PlanError

    if ranks.count() > 1:
        raise PlanError(f"{what} by one process; leave out torchrun")


def train_arguments(context: typer.Context) -> dict[str, Any]:
    """The fields of --train-args, but those over which an option of the command line wins; a note on each of these."""
    if (path := context.params.get("train_args")) is None:
        return {}
    from secateur.training import arguments as train_arguments

    given = [name for name in train_arguments.INSTEAD if name in context.params and kinds.given(context, name)]
    return train_arguments.without_given(train_arguments.read(path), given, note)


@contextlib.contextmanager
def resumable(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Ctrl-C becomes Interrupted where a checkpoint is kept. arguments: those of the training."""
    try:
        yield
    except KeyboardInterrupt:
        from secateur.errors import Interrupted
        from secateur.training import checkpoints

        kept = checkpoints.last(arguments.get("output_dir"))
        if kept is None:
            raise
        raise Interrupted(f"interrupted; {kept} is kept: give the same command again to go on from it") from None


def task_options(params: dict[str, Any]) -> "Options":
    """What the options of a command say about its task. params: the parameters of the command."""
    from secateur.tasks.base.task import Options

    named: dict[str, str | None] = {}
    for role in ("text", "label", "target", "image", "audio"):
        given = params.get(f"{role}_column")
        named[role] = ",".join(given) if isinstance(given, list | tuple) and given else given or None
    names = params.get("label_names")
    chosen = {name: params[name] for name in ("max_length", "new_tokens", "seed") if params.get(name) is not None}
    return Options(columns=named, label_names=tuple(n.strip() for n in names.split(",")) if names else (), **chosen)


def percent(value: float) -> str:
    """0.8123 -> 81.2%."""
    return f"{100 * value:.1f}%"


def megabytes(value: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{value / 1e6:.1f}"


def millions(value: float) -> str:
    """A count in millions."""
    return f"{value / 1e6:.2f}M"
