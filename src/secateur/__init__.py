"""secateur makes a trained Transformer smaller and faster, and proves that it did."""

import importlib.util
from typing import Any

import wrapt

from secateur._version import __version__

__all__ = ["__version__"]


@wrapt.when_imported("transformers.quantizers.auto")
def _teach_transformers(_: Any) -> None:
    """Let `from_pretrained` open what secateur saved, from the moment that transformers can load models."""
    if importlib.util.find_spec("torch") is not None:
        from secateur.torch import quantizer

        quantizer.register()
