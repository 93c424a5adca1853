"""text-generation: a language model that predicts each token of a text from those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.data.columns import Column
from secateur.data.table import Table
from secateur.errors import ModelError
from secateur.metrics.metric import Metric
from secateur.metrics.texts import PERPLEXITY, TOKEN_ACCURACY, Tokens
from secateur.tasks.base.task import Examples, Task
from secateur.tasks.base.tokens import batch_for, documents, filled, longest, same_tokens, shown_tokens, tokens_at
from secateur.torch.base.batches import IGNORED
from secateur.torch.data.text_rows import text_positions
from secateur.torch.data.token_windows import check_context, cut, tokens_of

DOCUMENTS = Column("text", "--text-column", ("text", "content", "document", "sentence", "article", "review"))


class TextGeneration(Task):
    """A language model that predicts each token of a text from those before it.

    Documents are packed: their tokens follow each other and are cut into windows of `Options.max_length` tokens, which
    are the rows of metrics. The text itself says what is right.
    """

    name = "text-generation"
    auto_classes = ("CausalLM",)
    columns = (DOCUMENTS,)
    is_supervised = False

    def encode(self, table: Table) -> Examples:
        """One feature a window; tokens beyond the last whole window are left out."""
        network: Any = self.model
        context = self.options.max_length
        check_context(text_positions(network), context)
        found = documents(table, self.choose(table).names["text"])
        tokens = tokens_of(self.processor, found, network.get_input_embeddings().weight.shape[0])
        windows = cut(tokens, context, table.source)
        features = [{"input_ids": ids, "labels": ids} for ids in windows.tolist()]
        return Examples(features, range(len(windows)), list(windows[:, 1:].numpy()), len(windows))

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids, an attention mask, and the ids as labels; models shift these themselves."""
        size = pad_to or longest(features, "input_ids")
        padding = self.processor.pad_token_id or 0
        batch = {"input_ids": filled([f["input_ids"] for f in features], padding, size)}
        batch["attention_mask"] = filled([[1] * len(f["input_ids"]) for f in features], 0, size)
        if "labels" in features[0]:
            batch["labels"] = filled([f["labels"] for f in features], IGNORED, size)
        return batch

    def largest_batch(self, features: Sequence[Mapping[str, Any]]) -> int | None:
        """As many windows as their logits allow."""
        return batch_for(self.model, longest(features, "input_ids"))

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every token but the last, from which the next one is predicted; a pair for each window, without copies."""
        lengths = batch["attention_mask"].sum(1).tolist()
        logits = _logits(output, batch)
        return [
            (logits[i, : length - 1], torch.full((length - 1,), i, device=logits.device))
            for i, length in enumerate(lengths)
        ]

    def decisions(self, batch: Mapping[str, Any]) -> int:
        """Every token but the last of each window."""
        return int(batch["attention_mask"].sum()) - len(batch["attention_mask"])

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """After each token the most likely next one; the first has none before it."""
        ids = batch["input_ids"]
        next_ones = torch.cat([ids[:, :1], output.logits[:, :-1].argmax(-1)], 1)
        return {"labels": next_ones.masked_fill(batch["attention_mask"] == 0, IGNORED)}

    def read(self, model: Any, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """The most likely tokens of each window, and the loss of those that are there."""
        targets = batch["input_ids"][:, 1:]
        return [
            tokens_at(logits, targets[i, : len(logits)]) for i, (logits, _) in enumerate(self.positions(output, batch))
        ]

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Tokens:
        """What `read` gave."""
        return parts[0]

    def same(self, prediction: Any, other: Any) -> float | None:
        """The share of tokens for which the models find the same one most likely."""
        return same_tokens(prediction, other)

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """Perplexity, and the share of tokens that are the most likely ones."""
        return (PERPLEXITY, TOKEN_ACCURACY) if has_references else (TOKEN_ACCURACY,)

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The most likely token at each position, and the perplexity."""
        return shown_tokens(prediction, self.processor, has_loss=True)


def _logits(output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits (windows, tokens, vocabulary); ModelError where a model gives none for each token."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != batch["input_ids"].shape:
        raise ModelError("the model gives no logits for each token; load it with --task text-generation")
    return logits
