"""secateur makes a trained Transformer smaller and faster, and proves that it did."""

from secateur._version import __version__

__all__ = ["__version__"]
