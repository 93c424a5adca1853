"""One self-contained HTML page from the records of models: it asks for nothing from a network, and users' text in it
is always text.

The page allows its own scripts and styles, nothing from elsewhere, and no code made from strings: Vega runs its
expressions by an interpreter (`ast`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur._version import __version__
from secateur.errors import ModelError
from secateur.files import new_file
from secateur.record import NAME, read_record
from secateur.report import parts, tables
from secateur.report.bundle import check_packages, javascript
from secateur.schemas.record import Record


def write_report(records: Sequence[Record], path: Path, *, overwrite: bool = False) -> Path:
    """Write the page of one record, or of several side by side, and return its path.

    Examples inside the records are shown. Raises SecateurError when a package is missing (`pip install
    'secateur[report]'`), when `path` exists and is not to be overwritten, or cannot be written.
    """
    text = render(records)
    with new_file(Path(path), overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return Path(path)


def of_folders(folders: Sequence[Path]) -> list[Record]:
    """The record of each folder. Raises ModelError for a folder that has none, or a damaged one."""
    records = []
    for folder in folders:
        record = read_record(folder)
        if record is None:
            what = f"has no {NAME}" if folder.is_dir() else "is not a folder"
            raise ModelError(
                f"{folder} {what}; name a folder that secateur wrote, such as that of "
                "`secateur prune MODEL --data DATA --speed-up 2 --on onnx --output FOLDER`"
            )
        records.append(record)
    return records


def render(records: Sequence[Record]) -> str:
    """The page as text. Raises SecateurError when there is no record or a package is missing."""
    if not records:
        raise ModelError("a report needs at least one record; there is none")
    check_packages()
    import jinja2
    from markupsafe import Markup

    home = Path(__file__).parent / "template"

    def source(name: str) -> str:
        return (home / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = lambda value: Markup(script_json(value))
    models = [parts.of_record(record, number) for number, record in enumerate(records, 1)]
    several = len(models) > 1
    return environment.get_template("page.html").render(
        title=f"Comparison of {len(models)} models" if several else models[0].title,
        models=models,
        comparison=tables.comparison(records) if several else None,
        scatter=parts.comparison(records) if several else None,
        version=__version__,
        style=Markup(source("style.css")),
        script=Markup(source("script.js")),
        vega=Markup(javascript()),
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a <script> element: no text in it ends the element or starts a comment."""
    text = json.dumps(value, allow_nan=False)  # ASCII: U+2028 and U+2029 are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
