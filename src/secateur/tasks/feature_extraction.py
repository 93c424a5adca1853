"""feature-extraction: a text to one vector, or two texts to their cosine.

Encoders without a head, and sentence-transformers folders, whose pooling and normalisation are read from their files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from secateur.data.columns import Choice, Column, choose, number, texts
from secateur.data.table import Table
from secateur.errors import DataError, ModelError, shown
from secateur.metrics.metric import Metric
from secateur.metrics.numbers import COSINE, PEARSON, SPEARMAN, cosines
from secateur.tasks.base.fisher import noise
from secateur.tasks.base.task import Examples, Options, Task
from secateur.tasks.text_classification import TEXT
from secateur.torch.base.batches import run
from secateur.torch.data.pooling import read_embedding
from secateur.torch.data.text_rows import padded, token_ids
from secateur.torch.files.companions import folder_of

SCORE = Column("label", "--label-column", ("score", "similarity_score", "similarity"), is_needed=False)


class FeatureExtraction(Task):
    """A text to one vector, or two texts to their cosine.

    The embedding is what the model's sentence-transformers folder makes of the token vectors; without such a folder it
    is their mean.
    """

    name = "feature-extraction"
    auto_classes = ("AutoModel", "TextEncoding")
    columns = (TEXT, SCORE)
    has_own_loss = True
    is_supervised: ClassVar[bool] = False
    divergence_name = "1 - cosine"

    def __init__(self, model: nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(
                f"a {type(model).__name__} needs a decoder's inputs, and gives no embedding of a text; open its encoder"
            )
        source = str(getattr(model, "name_or_path", "") or "")
        folder = folder_of(source)
        if source and folder is None:
            self.notes.append(f"the files of {source} are not found; the mean of token vectors is taken as embedding")
        self.embedding = read_embedding(folder)
        self.has_pairs: bool | None = None
        """Whether the encoded rows are pairs of texts; None before any are encoded."""
        self.largest: int | None = None
        """What scores are divided by before a loss compares them with cosines; None before any are seen."""

    @property
    def companions(self) -> dict[str, Any]:
        """The tokenizer, and of a sentence-transformers folder all that is not weights or config of the transformer."""
        return {"tokenizer": self.processor, "carried": self.embedding.folder}

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def choose(self, table: Table) -> Choice:
        """The texts; and their score, which only pairs have."""
        named = self.options.columns
        chosen = choose(table, self.columns, named)
        if len(chosen.names["text"]) == 1 and "label" in chosen.names:
            if named.get("label") is not None:
                raise DataError(f"{SCORE.option} names the score of a pair; name two texts with {TEXT.option} a,b")
            chosen = choose(table, (TEXT,), {"text": named.get("text")})
        self.notes += [sentence for sentence in chosen.found if sentence not in self.notes]
        return chosen

    def encode(self, table: Table) -> Examples:
        """One feature a row; of a pair it holds both texts."""
        chosen = self.choose(table).names
        columns = [texts(table, name) for name in chosen["text"]]
        if len(columns) > 2:
            raise DataError(f"{TEXT.option} names {len(columns)} columns; an embedding is of one text, a score of two")
        if self.has_pairs not in (None, len(columns) == 2):
            raise DataError(f"{table.source} and the data before differ: one holds pairs of texts, the other does not")
        self.has_pairs = len(columns) == 2
        limit = min(self.options.max_length, self.embedding.max_length or self.options.max_length)
        encoded = [token_ids(self.model, self.processor, self.embedding.texts(column), limit) for column in columns]
        features = [{key: encoded[0][key][i] for key in encoded[0]} for i in range(len(table))]
        if self.has_pairs:
            for i, feature in enumerate(features):
                feature["second"] = {key: encoded[1][key][i] for key in encoded[1]}
        references = None
        if "label" in chosen:
            references = _scores(table, chosen["label"])
            if self.largest is None:  # scores beyond 1, such as 0 to 5
                self.largest = max(1, math.ceil(max(map(abs, references))))
            for feature, score in zip(features, references, strict=True):
                feature["labels"] = score / self.largest
        return Examples(
            features, range(len(table)), references, len(table), [" | ".join(row) for row in zip(*columns, strict=True)]
        )

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded; of pairs all first texts and then all second ones."""
        seconds = [feature["second"] for feature in features if "second" in feature]
        batch = padded(self.processor, [*features, *seconds], pad_to)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features], dtype=torch.float32)
        return batch

    def length(self, feature: Mapping[str, Any]) -> int:
        """Tokens of the longer text."""
        return max(len(feature["input_ids"]), len(feature.get("second", feature)["input_ids"]))

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def embed(self, output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings (texts, width) of a model's output."""
        return self.embedding.of(output.last_hidden_state, batch.get("attention_mask"))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The squared error of the cosine against the score of a pair; without scores that of `own_labels`.

        Its labels are vectors, and the loss is half the squared distance to them, a mean over texts.
        """
        unit = F.normalize(self.embed(run(model, batch), batch).float(), dim=-1)
        labels = batch["labels"]
        if labels.dim() == 2:
            return (unit - labels).square().sum(-1).mean() / 2
        first, second = unit.chunk(2)
        return ((first * second).sum(-1) - labels).square().mean()

    def divergence(self, output: Any, dense: Any, batch: Mapping[str, Any], temperature: float = 1.0) -> torch.Tensor:
        """1 - cosine of the embeddings; of a pair the mean of both. A temperature has no meaning here."""
        own, wanted = (F.normalize(self.embed(o, batch).float(), dim=-1) for o in (output, dense))
        if own.shape != wanted.shape:
            raise DataError(
                f"embeddings of {own.shape[-1]} and of {wanted.shape[-1]} numbers cannot be compared; keep the hidden "
                "width of an encoder"
            )
        apart = (own - wanted).square().sum(-1) / 2  # of unit vectors; exactly zero where they are the same
        return apart.reshape(2, -1).mean(0) if self.has_pairs else apart

    def examples_of(self, batch: Mapping[str, Any]) -> int:
        """Texts, or pairs of them."""
        return super().examples_of(batch) // (2 if self.has_pairs else 1)

    def fisher_loss(self, output: Any, batch: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        """The unit embedding times Gaussian noise: the curvature of 1 - cosine is J^T J, see `own_labels`."""
        unit = F.normalize(self.embed(output, batch).float(), dim=-1)
        return (unit * noise(unit, generator)).sum() * (0.5**0.5 if self.has_pairs else 1.0)

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The model's own unit embeddings with Gaussian noise added: answers drawn around what the model says.

        A model is nearest to itself, so that 1 - cosine has no gradient at the dense model, only curvature. With u the
        unit embedding, 1 - cosine is |u - v|^2 / 2, whose curvature at v = u is J^T J with J = du/dw. The gradient of
        |u - v|^2 / 2 for v = u + e, e ~ N(0, 1), is -J^T e, and its expected square is the diagonal of J^T J: the
        Fisher information of a Gaussian around the embedding, from labels drawn from the model itself (Martens, 2020;
        Kunstner et al., 2019, on why they are to be drawn). Criteria that square gradients (fisher) are meant for it.

        The noise depends on the seed and on the texts of the batch alone.
        """
        unit = F.normalize(self.embed(output, batch).float(), dim=-1)
        seed = zlib.crc32(np.ascontiguousarray(batch["input_ids"].cpu().numpy()).tobytes(), self.options.seed)
        noise = torch.randn(unit.shape, generator=torch.Generator().manual_seed(seed))
        return {"labels": unit + noise.to(unit.device)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def read(self, model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The embedding of a text (width,); of a pair both (2, width)."""
        vectors = self.embed(output, batch).float().cpu().numpy()
        return list(np.stack(np.split(vectors, 2), 1)) if self.has_pairs else list(vectors)

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Any:
        """The embedding, or both."""
        return parts[0]

    def same(self, prediction: Any, other: Any) -> bool | None:
        """Vectors are no answers that are the same or not."""
        return None

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """Correlations of cosine and score; without scores the cosine to the dense model's embeddings."""
        if has_references:
            return replace(SPEARMAN, rows=_cosines_and_scores), replace(PEARSON, rows=_cosines_and_scores)
        return (COSINE,)

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The numbers of the embedding; of a pair the cosine."""
        if self.has_pairs:
            return {"cosine": float(cosines(prediction[:1], prediction[1:])[0, 0])}
        return {"embedding": [float(value) for value in prediction]}


def _scores(table: Table, names: Sequence[str]) -> list[float]:
    if len(names) != 1:
        raise DataError(f"{SCORE.option} names {len(names)} columns; a pair has one score")
    found = []
    for row, cell in enumerate(table.column(names[0])):
        value = number(cell)
        if value is None:
            raise DataError(f"{table.where(row)}: {shown(cell, 60)} in column {names[0]!r} is no number (a score)")
        found.append(value)
    return found


def _cosines_and_scores(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """(rows, 2): the cosine of each pair, and its score."""
    pairs = np.stack(list(predictions))
    return np.concatenate([cosines(pairs[:, 0], pairs[:, 1]), np.asarray(references, np.float64)[:, None]], 1)
