"""Markdown from values of any kind: text that stays text, tables, code."""

import html
import re
from collections.abc import Iterable, Sequence

from secateur.errors import printable

_MARKS = re.compile(r"([\\`*_\[\]#|~$!])")


def line(value: object) -> str:
    """A value in one line, in which nothing is hidden."""
    return printable(" ".join(str(value).split()))


def plain(value: object) -> str:
    """A value as Markdown that shows it as it is: nothing in it becomes markup, a link or HTML."""
    return _MARKS.sub(r"\\\1", html.escape(line(value), quote=False))


def code(value: object) -> str:
    """A value as code within a line."""
    text = _visible(line(value).replace("`", "'").replace("|", "\\|"))
    return f"`{text}`" if text else ""


def fence(text: str, language: str = "") -> list[str]:
    """Lines of code as a block, which no line of the code can end."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    marks = "`" * (longest + 1)
    return [f"{marks}{language}", *_visible(printable(text, keep="\n")).splitlines(), marks, ""]


def _visible(text: str) -> str:
    """Code that begins no comment of HTML, by which a card marks its parts."""
    return text.replace("<!--", "<! --")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table of cells that are Markdown already; its first `left` columns are text, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return [*(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)), ""]


def number(value: float | None, unit: str = "") -> str:
    """A measured number with four digits, or a dash."""
    if value is None:
        return "-"
    shown = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{shown}{unit}"
