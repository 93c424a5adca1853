"""Shows docstrings of plain prose in the reference: lines `name: text` about parameters become lists."""

import re
from typing import Any

import griffe

_LINE = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>.*)$")


def with_lists(text: str, parameters: set[str]) -> str:
    """A docstring whose lines about parameters are a Markdown list; indented lines go on with the one before."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _LINE.match(line)
        names = [name.lstrip("*") for name in found["names"].split(", ")] if found else []
        if found and parameters.issuperset(names):
            if not inside and lines and lines[-1]:
                lines.append("")
            lines.append(f"- {', '.join(f'`{name}`' for name in names)}: {found['text']}")
            inside = True
            continue
        if inside and line and not line.startswith(" "):
            lines.append("")
            inside = False
        lines.append(f"  {line.strip()}" if inside and line else line)
    return "\n".join(lines)


class Parameters(griffe.Extension):
    """Rewrites the docstring of each function, and of each class by its attributes and its constructor."""

    def on_function(self, *, func: Any, **kwargs: Any) -> None:
        """A function that was read from a source."""
        if func.docstring:
            func.docstring.value = with_lists(func.docstring.value, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: Any, **kwargs: Any) -> None:
        """A class that was read from a source, its members with it."""
        if cls.docstring:
            names = {name for name, member in cls.members.items() if member.is_attribute}
            if "__init__" in cls.members:
                names |= {parameter.name for parameter in cls.members["__init__"].parameters}
            cls.docstring.value = with_lists(cls.docstring.value, names)
