"""fill-mask: an encoder that says which token stands behind a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from secateur.data.table import Table
from secateur.errors import DataError, ModelError
from secateur.metrics.metric import Metric
from secateur.metrics.texts import PSEUDO_PERPLEXITY, TOKEN_ACCURACY, Tokens
from secateur.tasks.base.task import Examples, Task
from secateur.tasks.base.tokens import batch_for, documents, longest, same_tokens, shown_tokens, tokens_at
from secateur.tasks.text_generation import DOCUMENTS
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.text_rows import padded, token_ids

MASKED = 0.15
"""Share of the tokens of a text that are masked (Devlin et al., 2019)."""


class FillMask(Task):
    """An encoder that says which token stands behind a mask.

    In each text 15% of the tokens, at least one, are masked: which ones is decided by `Options.seed` and the row, so
    that they are the same for every model. Texts that hold masks themselves keep them, and nothing says what is right.
    """

    name = "fill-mask"
    auto_classes = ("MaskedLM",)
    columns = (DOCUMENTS,)
    is_supervised = False
    reads_labels = True

    def encode(self, table: Table) -> Examples:
        """One feature a text, with labels where this masks its tokens."""
        if self.processor.mask_token_id is None:
            raise ModelError(f"the tokenizer of a {type(self.model).__name__} has no mask token; give it one")
        found = documents(table, self.choose(table).names["text"])
        encoded = token_ids(self.model, self.processor, found, self.options.max_length)
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(found))]
        given = [self.processor.mask_token_id in feature["input_ids"] for feature in features]
        if any(given):
            if not all(given):
                mask = self.processor.mask_token
                raise DataError(f"some texts hold {mask} and others do not: {found[given.index(False)][:60]!r}")
            return Examples(features, range(len(found)), None, len(found), found)
        references = [self._mask(feature, row, found[row]) for row, feature in enumerate(features)]
        return Examples(features, range(len(found)), references, len(found), found)

    def _mask(self, feature: dict[str, Any], row: int, text: str) -> np.ndarray:
        """Mask tokens of a feature in place; the tokens that were there, in order."""
        ids = np.array(feature["input_ids"])
        choice = np.flatnonzero(~np.isin(ids, self.processor.all_special_ids))
        if not len(choice):
            raise DataError(f"row {row} has no token that could be masked: {text[:60]!r}; remove it")
        count = max(1, round(MASKED * len(choice)))
        places = np.sort(np.random.default_rng([self.options.seed, row]).choice(choice, count, replace=False))
        labels = np.full(len(ids), IGNORED)
        labels[places] = ids[places]
        ids[places] = self.processor.mask_token_id
        feature["input_ids"], feature["labels"] = ids.tolist(), labels.tolist()
        return labels[places]

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, padded, with labels at the masks."""
        batch = padded(self.processor, features, pad_to)
        if "labels" in features[0]:
            size = batch["input_ids"].shape[1]
            rows = [[*f["labels"], *[IGNORED] * (size - len(f["labels"]))] for f in features]
            batch["labels"] = torch.tensor(rows, dtype=torch.long)
            if self.processor.padding_side == "left":
                for row, feature in zip(batch["labels"], features, strict=True):
                    row.copy_(row.roll(size - len(feature["labels"])))
        return batch

    def largest_batch(self, features: Sequence[Mapping[str, Any]]) -> int | None:
        """As many texts as their logits allow."""
        return batch_for(self.model, longest(features, "input_ids"))

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The masks."""
        where = self._masks(batch).nonzero()
        return [(output.logits[where[:, 0], where[:, 1]], where[:, 0])]

    def _masks(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Where the masks are (texts, tokens)."""
        return batch["input_ids"] == self.processor.mask_token_id

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The most likely tokens at the masks."""
        return {"labels": output.logits.argmax(-1).masked_fill(~self._masks(batch), IGNORED)}

    def read(self, model: Any, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The most likely token at each mask of a text, and the loss of those that were there."""
        labels = batch.get("labels")
        found = []
        for i, places in enumerate(self._masks(batch)):
            targets = None if labels is None else labels[i, places]
            found.append(tokens_at(output.logits[i, places], targets))
        return found

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Tokens:
        """What `read` gave."""
        return parts[0]

    def same(self, prediction: Any, other: Any) -> float | None:
        """The share of masks with the same answer."""
        return same_tokens(prediction, other)

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """The share of masks behind which the most likely token stands, and the perplexity of those tokens."""
        return (TOKEN_ACCURACY, PSEUDO_PERPLEXITY) if has_references else (TOKEN_ACCURACY,)

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The token behind each mask."""
        return shown_tokens(prediction, self.processor, has_loss=False)
