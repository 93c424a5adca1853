"""Where secateur's operators for ONNX Runtime are installed; `runner`, which imports nothing of ours, takes a path."""

from secateur.kernels.native import onnx_library


def installed_library() -> str | None:
    """The path of the library, or None where secateur was installed without it."""
    try:
        return onnx_library()
    except (ImportError, OSError):
        return None
