"""Which tokens of a batch are padding, among those that each module reads.

The mask is that of the stream (encoder or decoder) from which the input of the module is computed, in the shape of the
input.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from secateur.errors import DataError
from secateur.layout import Layout
from secateur.torch.base.batches import IGNORED, LABELS, frame_mask

TokenMask = Callable[[str, tuple[int, ...]], torch.Tensor | None]
"""(module path, shape of its input without the features) -> bool mask of the real tokens, of that shape or of its first
two dimensions, or None when all are real.
"""


def no_padding(path: str, shape: tuple[int, ...]) -> None:
    """The TokenMask of data without padding."""


class Padding:
    """The TokenMask of one pass over data; call `see` with each batch before the model runs on it.

    model: says how the frames that its layers read follow from the samples of a sound; None where nothing is read so.
    unplaced: module path -> shape of its input, where rows could not be matched with tokens, so that padding counts.
    """

    def __init__(self, layout: Layout, model: Any = None) -> None:
        self._layout, self._model = layout, model
        self._batch: Any = None
        self._inputs: dict[str, frozenset[str]] = {}
        self._knows_decoder = any(_of_decoder(linear.inputs) for linear in layout.linears.values())
        self.unplaced: dict[str, tuple[int, ...]] = {}

    def see(self, batch: Any) -> None:
        """Take the mask from this batch, which runs next."""
        self._batch = batch

    def report(self) -> None:
        """Warn of modules whose padding could not be found, if there are any."""
        if self.unplaced:
            path, shape = next(iter(self.unplaced.items()))
            rows = " x ".join(map(str, shape))
            warnings.warn(
                f"padding counts in {len(self.unplaced)} linear layers, as their rows could not be matched with the "
                f"tokens of the batch (such as {path}, which read {rows} rows); pass batches without padding",
                stacklevel=2,
            )

    def __call__(self, path: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """See `TokenMask`. DataError where there is padding and the layout does not say what the decoder reads."""
        mask = self._stream(path)
        if mask is None or shape[:2] == mask.shape:
            return mask
        if len(shape) == 2 and shape[0] == mask.shape[0]:
            of_frames = frame_mask(self._model, mask, shape[1])
            if of_frames is not None:
                return of_frames
        if [n for n in shape if n != 1] in ([mask.numel()], [n for n in mask.shape if n != 1]):
            return mask.reshape(shape)
        rows = math.prod(shape)
        flat = len(shape) == 1 and rows != mask.shape[0]
        if (flat or rows % mask.numel() == 0) and not mask.all():
            self.unplaced.setdefault(path, shape)
        return None

    def _stream(self, path: str) -> torch.Tensor | None:
        """The mask (batch, positions) of the stream that a module reads.

        In an encoder-decoder it is that of the decoder where the input of the module is computed from inputs of the
        decoder, else that of the encoder.
        """
        if not isinstance(self._batch, Mapping):
            return None
        encoder, decoder = _mask(self._batch.get("attention_mask")), _decoder_mask(self._batch)
        if not any(name.startswith("decoder_") for name in self._batch):
            return encoder
        if not self._knows_decoder:
            if all(mask is None or bool(mask.all()) for mask in (encoder, decoder)):
                return None
            raise DataError(
                "the layout does not say what reads the encoder and what the decoder, so padding cannot be left out; "
                "pass batches without padding, or open the model without layout= on an example with decoder_input_ids"
            )
        if path not in self._inputs:
            self._inputs[path] = self._read_by(path)
        inputs = self._inputs[path]
        return decoder if _of_decoder(inputs) else encoder if inputs else None

    def _read_by(self, path: str) -> frozenset[str]:
        """Inputs of the model from which the input of the linear weights in a module is computed."""
        names = (self._layout.tied.get(f"{path}.weight", ""), *self._layout.linears)
        linears = [
            self._layout.linears[name]
            for name in names
            if name in self._layout.linears and (name == names[0] or name.startswith(f"{path}."))
        ]
        return frozenset().union(*(linear.inputs for linear in linears))


def _of_decoder(names: frozenset[str]) -> bool:
    """Whether one of the inputs belongs to the decoder; labels do, as a model makes decoder ids from them."""
    return any(name.startswith("decoder_") or name in LABELS for name in names)


def _mask(value: Any) -> torch.Tensor | None:
    """An attention mask (batch, positions) as bool; None for anything else."""
    return value.bool() if isinstance(value, torch.Tensor) and value.dim() == 2 else None


def _decoder_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask of the decoder; where its ids are made from labels, the positions whose label counts."""
    labels, ids = batch.get("labels"), batch.get("decoder_input_ids")
    mask = _mask(batch.get("decoder_attention_mask"))
    if (
        mask is None
        and isinstance(labels, torch.Tensor)
        and isinstance(ids, torch.Tensor)
        and labels.shape == ids.shape
    ):
        return _mask(labels != IGNORED)
    return mask
