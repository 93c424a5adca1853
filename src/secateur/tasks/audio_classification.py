"""audio-classification: a sound to a class, to several labels, or to a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.data.table import Table
from secateur.errors import DataError
from secateur.tasks.base.classification import LABEL, OwnLoss
from secateur.tasks.base.media import AUDIO, Sounds, load, named_cells, padded_sounds
from secateur.tasks.base.task import Examples


class AudioClassification(OwnLoss):
    """A sound to a class, to several labels, or to a number."""

    name = "audio-classification"
    auto_classes = ("AudioClassification",)
    columns = (AUDIO, LABEL)

    @classmethod
    def load_processor(cls, source: Any, **options: Any) -> Any:
        """The feature extractor, which names the sampling rate."""
        return load("AutoFeatureExtractor", source, "feature extractor", **options)

    @property
    def companions(self) -> dict[str, Any]:
        """The feature extractor."""
        return {"processor": self.processor}

    def encode(self, table: Table) -> Examples:
        """One feature a row: the sound at the rate of the extractor, as the extractor makes it."""
        chosen = self.choose(table).names
        (column,) = chosen["audio"] if len(chosen["audio"]) == 1 else (None,)
        if column is None:
            raise DataError(f"--audio-column names {len(chosen['audio'])} columns; a model reads one sound")
        inputs = Sounds(self.model, self.processor, table, column).inputs(self.notes)
        features: list[dict[str, Any]] = [{"sound": given} for given in inputs]
        references = self.put_labels(features, table, chosen.get("label"))
        return Examples(features, range(len(table)), references, len(table), named_cells(table, column))

    def length(self, feature: Mapping[str, Any]) -> int:
        """Samples or frames of the sound."""
        return int(feature["sound"].length)

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Sounds, padded to the longest, with an attention mask where the extractor gives one."""
        return self.with_labels(padded_sounds(self.processor, features), features)
