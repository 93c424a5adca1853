"""Python code that comes with a model: transformers runs it, or asks on the terminal whether it may. We never ask."""

from typing import Any

from secateur.errors import ModelError

OPTION = "trust_remote_code"


def stated(value: Any) -> bool:
    """Whether the user has asked for such code; None, at which transformers asks on the terminal, is no."""
    return bool(value)


def check(source: object, error: BaseException) -> None:
    """Raise ModelError, with what to do, where an error of transformers says that a source needs code of its own."""
    if OPTION in str(error):
        raise ModelError(
            f"{source} works only with Python code that comes with it, which was not run; where you trust who wrote "
            f"it, pass {OPTION}=True (--trust-remote-code)"
        ) from error
