"""The command line: one file a command. Frameworks are imported inside the commands, so that `--help` is quick."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from inspect import cleandoc
from typing import Annotated, Any

import typer
import typer.core

from secateur._version import __version__
from secateur.cli import (
    bench,
    common,
    demo,
    doctor,
    evaluate,
    export,
    failures,
    inspect,
    progress,
    prune,
    report,
    run,
    train,
)
from secateur.cli.shell import welcome
from secateur.errors import Interrupted, SecateurError, printable
from secateur.files import claims_kept
from secateur.training import ranks

app = typer.Typer(
    name="secateur",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make a trained Transformer smaller and faster, and prove that it is.",
)
MODULES: Any = (inspect, prune, train, evaluate, run, export, bench, report, demo, doctor)
"""One module for each command, in the order of `--help`."""


class _Command(typer.core.TyperCommand):
    """A command whose --help stands in the last panel: without a panel of its own it would come before all others."""

    def get_help_option(self, ctx: Any) -> Any:
        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = common.OTHER_PANEL
        return option


def _add(module: Any) -> None:
    """Register a command with its help, joined to one line a paragraph because rich keeps line breaks; notes (where the
    module has `NOTES`) and examples follow the options.
    """
    paragraphs = cleandoc(module.command.__doc__).split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    after = (*getattr(module, "NOTES", ()), "Examples:", *(f"  {example}" for example in module.EXAMPLES))
    app.command(module.NAME, cls=_Command, help=text, epilog="\n\n".join(after))(module.command)


for module in MODULES:
    _add(module)

BAD_INPUT = 2
"""Exit code for errors that a user can mend: bad input, a folder that cannot be written."""
INTERRUPTED = 130
"""Exit code of an interrupted run, as of every program that Ctrl-C ends; what typer returns after it."""
UsageError: Any = typer.BadParameter.__bases__[0]
"""Typer has its own copy of click under a private name; these are the base classes of click's command-line errors."""
CommandLineError: type[Exception] = UsageError.__bases__[0]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        common.say(welcome.screen())


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend become one sentence and exit code 2; others are ours to mend.

    An interrupted run ends with exit code 130, and a sentence on what is left of it.
    """
    try:
        with _terminate_like_interrupt(), claims_kept(), progress.started():
            code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as error:
        _fail_interrupted(str(error))
    except SecateurError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail_interrupted("interrupted; nothing was written")
    except CommandLineError as error:
        _fail_usage(error)
    except Exception as error:
        if (sentence := failures.sentence_for(error)) is None:
            _ask_for_report()
            raise
        _fail(sentence)


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that no temporary folder is left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        earlier_handler = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may do this
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier_handler)


def _ask_for_report() -> None:
    typer.echo(
        f"This is an error of secateur {__version__}, not of yours: please report what follows, with the command, at "
        "https://github.com/secateur/secateur/issues.",
        err=True,
    )


def _fail_interrupted(sentence: str) -> None:
    """End after Ctrl-C; of the processes of `torchrun` one says so."""
    if not ranks.is_first():
        sys.exit(INTERRUPTED)
    _fail(sentence, INTERRUPTED)


def _fail_usage(error: Any) -> None:
    context = getattr(error, "ctx", None)
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    _fail(f"{error.format_message().rstrip('.')}{hint}")


def _fail(sentence: str, code: int = BAD_INPUT) -> None:
    from rich.console import Console

    sentence = sentence if ranks.is_first() else f"process {ranks.own()}: {sentence}"
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(printable(sentence))}", highlight=False)
    sys.exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
