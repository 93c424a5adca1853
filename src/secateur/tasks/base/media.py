"""Images and sounds as inputs of models: their processors, and arrays that are kept or made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.data.columns import Column
from secateur.data.media import sound
from secateur.data.table import Table
from secateur.errors import DataError, ModelError, shown

AUDIO = Column("audio", "--audio-column", ("audio", "path", "file", "file_name"))
FILES = ("preprocessor_config.json", "processor_config.json")
"""Where image processors and feature extractors are saved; a folder has one of them."""
MOST_BYTES = 2**31
"""Arrays of the rows of a table that are kept in memory; those of further rows are made again at each use."""

Arrays = dict[str, np.ndarray]
"""What a processor makes of one row: name of a model's input -> array without the axis of the batch."""


@dataclass(frozen=True)
class Input:
    """What a model reads of one row.

    make: makes its arrays anew.
    kept: its arrays, or None where they are too large to be kept.
    length: of the first axis of the main input.
    """

    make: Callable[[], Arrays]
    kept: Arrays | None
    length: int

    def arrays(self) -> Arrays:
        """The arrays of the row."""
        return self.make() if self.kept is None else self.kept


def inputs_of(make: Callable[[int], Arrays], main: str, count: int) -> list[Input]:
    """The inputs of rows 0, 1, ..., each made once, so that a row that cannot be read is found before the work starts.

    make: row -> its arrays. main: the name of the main input.
    """
    total, inputs = 0, []
    for row in range(count):
        arrays = make(row)
        total += sum(array.nbytes for array in arrays.values())
        is_kept = total <= MOST_BYTES
        inputs.append(Input(_maker(make, row), arrays if is_kept else None, len(arrays[main])))
    return inputs


def _maker(make: Callable[[int], Arrays], row: int) -> Callable[[], Arrays]:
    return lambda: make(row)


def stacked(rows: Sequence[Arrays], pad: Callable[[dict[str, list[np.ndarray]]], Any]) -> dict[str, torch.Tensor]:
    """The arrays of several rows as one batch; `pad` is called where they differ in length."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if any(len({array.shape for array in arrays}) > 1 for arrays in columns.values()):
        return dict(pad(columns))
    return {name: torch.from_numpy(np.stack(arrays)) for name, arrays in columns.items()}


# -- processors -------------------------------------------------------------------------------------------------------


def load(auto: str, source: Any, what: str, **options: Any) -> Any:
    """The processor that a class of transformers loads; ModelError, with one sentence, when there is none.

    auto: `AutoImageProcessor` or `AutoFeatureExtractor`. what: how the sentence calls it.
    """
    import transformers  # optional

    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in FILES):
        raise ModelError(f"{source} holds no {what} ({FILES[0]}); save the one that the model was trained with into it")
    try:
        return getattr(transformers, auto).from_pretrained(source, **options)
    except ImportError:
        raise
    except Exception as error:  # damaged files raise many types of exception
        raise ModelError(f"{source} holds no {what} that can be read: {' '.join(str(error).split())[:200]}") from None


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of a model has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


# -- sounds -----------------------------------------------------------------------------------------------------------


class Sounds:
    """The column of sounds of a table as inputs of a model.

    extractor: the feature extractor; it names the sampling rate.
    """

    def __init__(self, model: nn.Module, extractor: Any, table: Table, column: str) -> None:
        self.model, self.extractor, self.table, self.column = model, extractor, table, column
        self.main = str(getattr(model, "main_input_name", "input_values"))
        if self.main not in extractor.model_input_names:
            raise ModelError(
                f"the model reads {self.main}, the feature extractor gives {extractor.model_input_names[0]}; they do "
                "not belong together"
            )
        self.longest = 0.0

    def inputs(self, notes: list[str]) -> list[Input]:
        """The input of each row; `notes` gets a sentence where sounds are cut."""
        inputs = inputs_of(self.make, self.main, len(self.table))
        heard = seconds_heard(self.extractor)
        if heard is not None and self.longest > heard:
            notes.append(
                f"sounds of up to {self.longest:.1f} seconds are cut: the model hears the first {heard:.1f} of each"
            )
        return inputs

    def make(self, row: int) -> Arrays:
        """What the extractor makes of the sound of a row; DataError when it is too short for the model."""
        rate = int(self.extractor.sampling_rate)
        samples = sound(self.table, self.column, row, rate)
        self.longest = max(self.longest, len(samples) / rate)
        made = self.extractor(samples, sampling_rate=rate)
        names = [name for name in (self.main, "attention_mask") if name in made and takes(self.model, name)]
        arrays = {name: np.asarray(made[name][0]) for name in names}
        arrays[self.main] = arrays[self.main].astype(np.float32)
        if not frames(self.model, len(arrays[self.main])) or not np.isfinite(arrays[self.main]).all():
            raise DataError(
                f"{self.table.where(row)}: a sound of {len(samples)} samples is too short for the model; remove it"
            )
        return arrays


def seconds_heard(extractor: Any) -> float | None:
    """How many seconds of a sound a feature extractor keeps, or None for all."""
    samples = getattr(extractor, "n_samples", None) or getattr(extractor, "nb_max_samples", None)
    if samples:
        return float(samples) / float(extractor.sampling_rate)
    frames_kept = getattr(extractor, "max_length", None)  # of 10 ms
    return frames_kept / 100 if isinstance(frames_kept, int) else None


def frames(model: Any, length: int) -> int:
    """How many frames a model makes of a sound of `length` samples; the length itself where it does not say it."""
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    if count is None or getattr(model, "main_input_name", None) != "input_values":
        return length
    return max(0, int(count(torch.tensor(length))))


def padded_sounds(extractor: Any, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The sounds of features as one batch, padded by the extractor to the longest."""
    rows = [feature["sound"].arrays() for feature in features]
    has_mask = "attention_mask" in rows[0]
    batch = stacked(rows, lambda columns: _pad(extractor, columns, has_mask=has_mask))
    if has_mask:
        batch["attention_mask"] = batch["attention_mask"].long()
    return batch


def _pad(extractor: Any, columns: dict[str, list[np.ndarray]], *, has_mask: bool) -> dict[str, torch.Tensor]:
    made = extractor.pad(columns, padding=True, return_attention_mask=has_mask, return_tensors="pt")
    return {name: made[name] for name in columns}


def named_cells(table: Table, column: str) -> list[str]:
    """What stands in a column of images or sounds, for a person: names of files, where there are any."""
    return [_named(cell) for cell in table.column(column)]


def _named(cell: Any) -> str:
    if isinstance(cell, Mapping):
        cell = cell.get("path")
    return shown(cell, 200)[1:-1] if isinstance(cell, str) else ""
