"""What code that is not ours may raise when it is tried out, and how that is said in one line.

For places where failing is an answer (this module is no norm, this configuration is refused): what is not listed here,
an interrupt or a full memory, is no answer and goes on its way.
"""

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
try:  # what the configurations of transformers raise; a ValueError in some versions only
    from huggingface_hub.errors import StrictDataclassError
except ImportError:  # plain PyTorch modules need no transformers
    pass
else:
    EXPECTED = (*EXPECTED, StrictDataclassError)


def in_a_line(error: BaseException, limit: int = 160) -> str:
    """The type and the first line of an error, cut to `limit` characters."""
    first = (str(error).strip().splitlines() or [""])[0].strip()
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."
