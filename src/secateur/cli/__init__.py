"""The command line: one file a command. Frameworks are imported inside the commands, so that `--help` is quick."""

import sys

import click
import typer

from secateur._version import __version__
from secateur.cli import demo, evaluate, inspect, prune, train
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make a trained Transformer smaller and faster, and prove that it is.",
)
for module in (inspect, prune, train, evaluate, demo):
    app.command(module.NAME, epilog=module.EXAMPLES)(module.command)

BAD_INPUT = 2
"""Exit code for everything that a user can mend: bad input, a folder that cannot be written, an interrupted run."""


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend become one sentence and exit code 2."""
    try:
        code = app(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SecateurError as error:
        _fail(str(error))
    except click.exceptions.Abort:
        _fail("interrupted; nothing was written")
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written")
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))


def _fail(sentence: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(sentence)}", highlight=False)
    sys.exit(BAD_INPUT)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
