"""Reading what a safetensors file says it holds, without its weights."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from secateur.errors import ModelError


def read_header(path: Path | str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type) of each tensor of a safetensors file; ModelError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}); save or copy it again") from None
