"""Values as tables of HTML, as notebooks show them: the `_repr_html_` of layouts, plans, evaluations and results."""

import html
from collections.abc import Iterable, Sequence
from itertools import islice

from secateur.errors import printable

MOST_ROWS = 50
"""The most rows of a table."""
MOST_CHARACTERS = 200
"""The longest cell."""


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, notes: Iterable[str] = ()
) -> str:
    """A titled table.

    columns: names of the columns. rows: a cell for each of them; None is a cell without a value. left: how many columns
    at the left are text; the others are numbers. notes: sentences below the table.

    Rows past `MOST_ROWS` are counted, and long cells are cut.
    """
    given = iter(rows)
    shown = list(islice(given, MOST_ROWS))
    left_out = sum(1 for _ in given)
    lines = [_row("th", columns, left), *(_row("td", row, left) for row in shown)]
    below = [*notes, *([f"{left_out:,} more rows"] if left_out else [])]
    return "".join(
        [
            f"<div><p><strong>{_escaped(title)}</strong></p>",
            f"<table>{''.join(lines)}</table>",
            *(f"<p>{_escaped(note)}</p>" for note in below if note),
            "</div>",
        ]
    )


def number(value: float | None) -> str:
    """A measured number with four digits; a dash for None and for what is no number."""
    return "-" if value is None or value != value else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """An interval, such as `-0.01 to 0.03`."""
    return "-" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _row(tag: str, cells: Sequence[object], left: int) -> str:
    """A row of a table."""
    sides = ("left" if index < left else "right" for index in range(len(cells)))
    inner = (f'<{tag} style="text-align: {s}">{_escaped(c)}</{tag}>' for c, s in zip(cells, sides, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


def _escaped(value: object) -> str:
    """A value as text in which nothing is markup; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    text = printable(" ".join(str(value).split()))
    return html.escape(text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}...")
