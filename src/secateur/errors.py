"""The errors a user can cause: each message says what is wrong, with which value, and what to do."""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 900
"""Longest message: what a file holds may be of any length."""


class SecateurError(ValueError):
    """Base of every error that a user's input, model or folder can cause; the CLI prints it and exits with 2.

    The message is one line of at most `MOST_CHARACTERS` that a terminal shows, whatever values stand in it.
    """

    def __init__(self, message: str = "") -> None:
        text = printable(" ".join(str(message).splitlines()))
        super().__init__(text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}...")


class LayoutError(SecateurError):
    """A layout is malformed, or does not fit a model."""


class PlanError(SecateurError):
    """A plan asks for what the layout does not allow, or its file is damaged."""


class TargetError(SecateurError):
    """A target of a search asks for nothing, contradicts itself or cannot be read."""


class DataError(SecateurError):
    """Data cannot be read, or does not fit the model."""


class TrainingDivergedError(DataError):
    """A training ended with a loss or weights that are NaN or infinite."""


class ModelError(SecateurError):
    """A model or folder cannot be opened, traced, pruned or saved."""


class Interrupted(SecateurError):
    """Ctrl-C stopped a run, of which something is left; the CLI exits with 130."""


def printable(text: str, keep: str = "") -> str:
    """Text as a terminal can show it: characters that it would obey or hide become escapes such as `\\x1b`.

    keep: characters that stay as they are, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shown(value: object, most: int = 100) -> str:
    """The repr of a value for a message, cut to `most` characters: what a file holds may be of any length."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names for a message, as they are where they are words, at most `most` of them."""
    texts = [str(name) for name in names]
    words = [text if text.isprintable() and len(text) <= 60 else shown(text, 60) for text in texts[:most]]
    return ", ".join(words) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def meant(name: str, names: Iterable[str]) -> str:
    """`; did you mean onnx?` for the end of a message where a name is mistyped; empty where none is near."""
    near = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
