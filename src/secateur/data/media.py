"""Images and sounds from cells of a table: paths, bytes of files, or numbers; decoded by Pillow and soundfile."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.table import Table
from secateur.errors import DataError, shown

MOST_PIXELS = 2**27
"""Pixels of the largest image that is decoded."""
LONGEST_SECONDS = 3600
"""The longest sound that is decoded."""


def image(table: Table, name: str, row: int, mode: str = "RGB") -> Any:
    """The cell as an image of Pillow, upright; DataError, with file and line, when it cannot be read.

    mode: `RGB`, or `L` for one channel. A cell is a path, bytes, an image, or numbers 0..255 as (height, width) or
        (height, width, channels).
    """
    from PIL import Image, ImageOps  # optional

    cell = table.column(name)[row]
    try:
        if isinstance(cell, Image.Image):
            return ImageOps.exif_transpose(cell).convert(mode)
        if isinstance(cell, list | np.ndarray):
            return Image.fromarray(_pixels(cell)).convert(mode)
        with Image.open(_file(table, name, row)) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise DataError(
                    f"{table.where(row)}: an image of {picture.width} x {picture.height} pixels is too large"
                )
            return ImageOps.exif_transpose(picture).convert(mode)
    except DataError:
        raise
    except Exception as error:  # damaged images raise many types
        raise DataError(f"{table.where(row)}: {_named(cell)} is no image that can be read ({_said(error)})") from None


def thumbnail(picture: Any, most: int = 96) -> str:
    """A small copy of an image of Pillow as a data URI (JPEG). most: pixels of its longer side."""
    small = picture.convert("RGB")
    small.thumbnail((most, most))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _pixels(cell: Any) -> np.ndarray:
    """Numbers as bytes (height, width) or (height, width, channels); ValueError for others than 0..255."""
    values = np.asarray(cell)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)
    pixels = values.astype(np.uint8) if values.dtype.kind in "iuf" else np.zeros(0, np.uint8)
    if pixels.shape != values.shape or not (pixels == values).all():
        raise ValueError("its numbers are not 0..255")
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def sound(table: Table, name: str, row: int, rate: int) -> np.ndarray:
    """The cell as samples (time,) in float32 of one channel at `rate` per second; DataError when it cannot be read."""
    import soundfile  # optional

    cell = table.column(name)[row]
    try:
        if isinstance(cell, list | np.ndarray):
            samples, found = np.asarray(cell, np.float32), rate
        elif isinstance(cell, Mapping) and cell.get("array") is not None:
            samples, found = np.asarray(cell["array"], np.float32), int(cell.get("sampling_rate") or rate)
        else:
            with soundfile.SoundFile(_file(table, name, row)) as file:
                if file.frames > LONGEST_SECONDS * file.samplerate:
                    raise DataError(f"{table.where(row)}: a sound of more than {LONGEST_SECONDS} seconds; cut it")
                samples, found = file.read(dtype="float32"), file.samplerate
    except DataError:
        raise
    except Exception as error:  # damaged sounds raise many types
        raise DataError(f"{table.where(row)}: {_named(cell)} is no sound that can be read ({_said(error)})") from None
    samples = samples.mean(-1) if samples.ndim == 2 else samples
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise DataError(f"{table.where(row)}: {_named(cell)} holds no samples, or NaN")
    return _resampled(samples, found, rate)


def _resampled(samples: np.ndarray, found: int, rate: int) -> np.ndarray:
    if found == rate:
        return samples
    from math import gcd

    from scipy.signal import resample_poly  # optional

    common = gcd(found, rate)
    return resample_poly(samples, rate // common, found // common).astype(np.float32)


def _file(table: Table, name: str, row: int) -> Any:
    """What a cell points at: a path (relative to where the table lies), or bytes."""
    cell = table.column(name)[row]
    if isinstance(cell, Mapping):
        if cell.get("bytes") is not None:
            return io.BytesIO(cell["bytes"])
        cell = cell.get("path")
    if isinstance(cell, bytes):
        return io.BytesIO(cell)
    if not isinstance(cell, str) or not cell:
        raise DataError(f"{table.where(row)}: column {name!r} holds {shown(cell, 60)}, not the name of a file")
    path = Path(cell)
    if not path.is_absolute() and table.base is not None:
        path = Path(table.base) / path
    if not path.is_file():
        raise DataError(f"{table.where(row)}: no file {path}")
    return str(path)


def _named(cell: Any) -> str:
    if isinstance(cell, Mapping):
        cell = cell.get("path") or "the file"
    return cell if isinstance(cell, str) else "the cell"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
