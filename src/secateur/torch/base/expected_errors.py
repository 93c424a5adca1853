"""The errors that foreign code may raise when secateur tries it out, and their text in one line.

For callers to whom a failure is an answer (this module is no norm, this configuration is refused). Errors that are not
listed here, such as an interrupt or a full memory, are no answer and propagate.
"""

import linecache
import os
import traceback
from pathlib import Path

import torch

_NOT_THEIRS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parents[2]) + os.sep)
"""Where PyTorch and secateur lie: an error in a forward pass is raised there, but its cause is further out."""

EXPECTED: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
try:  # configurations of transformers raise it; only in some versions it is a ValueError
    from huggingface_hub.errors import StrictDataclassError
except ImportError:  # plain PyTorch modules do not need transformers
    pass
else:
    EXPECTED = (*EXPECTED, StrictDataclassError)


def in_a_line(error: BaseException, limit: int = 160) -> str:
    """The type and the first line of an error, with the next one after a colon, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def line_of(error: BaseException, limit: int = 100) -> str:
    """The line of the model's code that raised an error, as `file.py:12, code`; empty where it has no source."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
    if not frames or not (code := linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()):
        return ""
    code = code if len(code) <= limit else f"{code[: limit - 3].rstrip()}..."
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {code}"
