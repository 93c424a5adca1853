"""image-classification: an image to a class, to several labels, or to a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from secateur.data.columns import Column
from secateur.data.media import image
from secateur.data.table import Table
from secateur.errors import DataError
from secateur.tasks.base.classification import LABEL, Classification
from secateur.tasks.base.media import Arrays, inputs_of, load, named_cells, stacked
from secateur.tasks.base.task import Examples
from secateur.torch.base.batches import evaluating

IMAGE = Column("image", "--image-column", ("image", "img", "pixel_values", "path", "file", "file_name"))
PIXELS = "pixel_values"


class ImageClassification(Classification):
    """An image to a class, to several labels, or to a number."""

    name = "image-classification"
    auto_classes = ("ImageClassification",)
    columns = (IMAGE, LABEL)

    @classmethod
    def load_processor(cls, source: Any, **options: Any) -> Any:
        """The image processor, on Pillow and numpy, which need no torchvision."""
        return load("AutoImageProcessor", source, "image processor", backend="pil", **options)

    @property
    def companions(self) -> dict[str, Any]:
        """The image processor."""
        return {"processor": self.processor}

    def encode(self, table: Table) -> Examples:
        """One feature a row: the image as the processor makes it."""
        chosen = self.choose(table).names
        (column,) = chosen["image"] if len(chosen["image"]) == 1 else (None,)
        if column is None:
            raise DataError(f"--image-column names {len(chosen['image'])} columns; a model reads one image")
        mode = "L" if getattr(self.config, "num_channels", 3) == 1 else "RGB"
        shapes: set[tuple[int, ...]] = set()

        def make(row: int) -> Arrays:
            pixels = self.processor([image(table, column, row, mode)], return_tensors="np")[PIXELS][0]
            shapes.add(pixels.shape)
            if len(shapes) > 1:
                raise DataError(
                    f"{table.where(row)}: the image processor gives images of different sizes "
                    f"({' and '.join(map(_size, sorted(shapes)))}); let its preprocessor_config.json resize them"
                )
            return {PIXELS: np.ascontiguousarray(pixels, np.float32)}

        inputs = inputs_of(make, PIXELS, len(table))
        self._try(inputs[0].arrays())
        features: list[dict[str, Any]] = [{"image": given} for given in inputs]
        references = self.put_labels(features, table, chosen.get("label"))
        names = named_cells(table, column)
        return Examples(
            features, range(len(table)), references, len(table), names, lambda row: image(table, column, row)
        )

    def _try(self, arrays: Arrays) -> None:
        """DataError when the processor makes images of a size that the model does not take."""
        size, shape = getattr(self.config, "image_size", None), arrays[PIXELS].shape
        wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if size is None or wanted == shape[1:]:
            return
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(pixel_values=torch.from_numpy(arrays[PIXELS])[None].to(device))
        except (ValueError, RuntimeError) as error:
            raise DataError(
                f"the image processor makes images of {_size(shape)}, which the model does not take "
                f"({' '.join(str(error).split())[:160]}); correct the size in preprocessor_config.json"
            ) from None

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Images (examples, channels, height, width)."""
        rows = [feature["image"].arrays() for feature in features]
        return self.with_labels(stacked(rows, dict), features)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
