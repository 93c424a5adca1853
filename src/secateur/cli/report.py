"""secateur report: the records of model folders as one page that a browser shows without a network."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "report"
EXAMPLES = (
    "secateur report ./small",
    "secateur report ./small ./smaller ./smallest --output comparison.html",
)


def command(
    folders: Annotated[list[Path], typer.Argument(help="Folders that secateur wrote.", metavar="FOLDER...")],
    *,
    output: Annotated[Path, typer.Option(help="HTML file to write.", rich_help_panel=common.OUTPUT_PANEL)] = Path(
        "report.html"
    ),
    overwrite: common.OverwriteOption = False,
) -> None:
    """Write one HTML page on what was asked of models and measured of them; several folders are compared.

    The page is one file: it opens without a network, and may be sent to others.
    """
    from secateur.files import check_output
    from secateur.report.bundle import check_packages
    from secateur.report.page import of_folders, write_report

    check_packages()
    check_output(output, overwrite=overwrite)
    written = write_report(of_folders(folders), output, overwrite=overwrite)
    common.say(f"{written} written, {common.megabytes(written.stat().st_size)} MB; open it in a browser")
