"""The front matter of a `README.md`: the YAML between lines `---` at its start, where hubs read what a model is."""

import re
from pathlib import Path
from typing import Any

import yaml

_BLOCK = re.compile(r"\A\s*---\r?\n([\s\S]*?)\r?\n---[ \t]*(?:\r?\n|\Z)")
MOST_BYTES = 2**20
"""Largest README that is read; those with hundreds of measured tasks have about 200 kB."""


def split(text: str) -> tuple[dict[str, Any], str]:
    """The entries of the front matter, and the text below it. What is no YAML object has no entries."""
    found = _BLOCK.match(text)
    if found is None:
        return {}, text
    try:
        entries = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError):  # of a tag's value
        entries = None
    return (entries if isinstance(entries, dict) else {}), text[found.end() :]


def read_front_matter(path: Path) -> dict[str, Any]:
    """The entries of the front matter of a file; none where there is no file, or it cannot be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        return split(path.read_text(encoding="utf-8"))[0]
    except (OSError, UnicodeDecodeError):
        return {}
