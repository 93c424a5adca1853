"""automatic-speech-recognition: a sound to its words, by frames (CTC) or by an encoder and a decoder that writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from secateur.data.columns import Column, texts
from secateur.data.table import Table
from secateur.errors import DataError, ModelError, shown
from secateur.metrics.metric import Metric
from secateur.metrics.transcripts import CHARACTER_ERROR_RATE, WORD_ERROR_RATE
from secateur.tasks.base.media import AUDIO, Sounds, frames, load, named_cells, padded_sounds
from secateur.tasks.base.task import Examples, Options, Task, at_labels
from secateur.torch.base.batches import IGNORED, evaluating, frame_mask, to_device, with_decoder_inputs
from secateur.torch.data.text_rows import load_tokenizer

TARGET = Column(
    "target", "--target-column", ("text", "sentence", "transcript", "transcription", "target"), is_needed=False
)


class Speech(NamedTuple):
    """What makes inputs of sounds and words of tokens; a processor of transformers has the same two parts."""

    feature_extractor: Any
    tokenizer: Any


class SpeechRecognition(Task):
    """A sound to its words.

    A model with CTC answers for each frame of the sound, and tokenizers join equal neighbours and drop blanks. An
    encoder-decoder writes one token after the other; on data without targets its decoder reads the words that the
    task's own model writes for the sound.
    """

    name = "automatic-speech-recognition"
    auto_classes = ("CTC", "SpeechSeq2Seq")
    columns = (AUDIO, TARGET)
    has_own_loss = True

    def __init__(self, model: nn.Module, processor: Any, options: Options | None = None) -> None:
        super().__init__(model, processor, options)
        self.writes = bool(getattr(self.config, "is_encoder_decoder", False))
        """Whether a decoder writes; else frames are classified."""
        if not self.writes and getattr(self.config, "pad_token_id", None) is None:
            raise ModelError(f"a {type(model).__name__} is no encoder-decoder, and its config names no blank of CTC")

    @classmethod
    def load_processor(cls, source: Any, **options: Any) -> Any:
        """The feature extractor and the tokenizer."""
        extractor = load("AutoFeatureExtractor", source, "feature extractor", **options)
        return Speech(extractor, load_tokenizer(source, **options))

    @property
    def companions(self) -> dict[str, Any]:
        """The feature extractor and the tokenizer."""
        return {"processor": self.processor.feature_extractor, "tokenizer": self.processor.tokenizer}

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def encode(self, table: Table) -> Examples:
        """One feature a row: the sound, and the tokens of its target as `labels`."""
        chosen = self.choose(table).names
        for role, names in chosen.items():
            if len(names) > 1:
                raise DataError(f"--{role}-column names {len(names)} columns; a model reads one")
        (column,) = chosen["audio"]
        extractor = self.processor.feature_extractor
        features: list[dict[str, Any]] = [
            {"sound": given} for given in Sounds(self.model, extractor, table, column).inputs(self.notes)
        ]
        references = None
        if "target" in chosen:
            references = texts(table, chosen["target"][0])
            unknown = 0
            for row, (feature, text) in enumerate(zip(features, references, strict=True)):
                feature["labels"] = self._tokens(text)
                unknown += self._check(table, row, text, feature)
            if unknown:
                self.notes.append(f"{unknown} of {len(references)} targets have characters that the tokenizer lacks")
        return Examples(features, range(len(table)), references, len(table), named_cells(table, column))

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a target as labels: those of a decoder end with its last token, and lack its first."""
        tokenizer = self.processor.tokenizer
        if not self.writes:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(tokenizer(text)["input_ids"])
        start = getattr(self.config, "decoder_start_token_id", None)
        ids = ids[1:] if ids[:1] == [start] and start is not None else ids
        end = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return [*ids, end] if isinstance(end, int) and ids[-1:] != [end] else ids

    def _check(self, table: Table, row: int, text: str, feature: Mapping[str, Any]) -> bool:
        """Whether a target has unknown tokens; DataError when it does not fit the sound or the model."""
        ids, where = feature["labels"], table.where(row)
        unknown = [i for i in ids if i == self.processor.tokenizer.unk_token_id]
        if len(unknown) + self.writes >= len(ids) or not text.strip():
            raise DataError(f"{where}: the tokenizer knows nothing of the target {shown(text, 60)}; look at its case")
        size = int(self.config.get_text_config(decoder=True).vocab_size)
        if max(ids) >= size:
            raise DataError(f"{where}: the tokenizer gives token {max(ids)}, the model knows {size}; they do not "
                            "belong together")  # fmt: skip
        if self.writes:
            positions = self._positions()
            if positions is not None and len(ids) > positions:
                raise DataError(f"{where}: the target has {len(ids)} tokens, the decoder {positions} positions; cut it")
        else:
            given, needed = frames(self.model, feature["sound"].length), len(ids) + _repeats(ids)
            if needed > given:
                raise DataError(
                    f"{where}: the target needs {needed} frames, the sound gives {given}; correct or remove the row"
                )
        return bool(unknown)

    def _positions(self) -> int | None:
        """How many tokens the decoder can hold, or None where the config does not say it."""
        text = self.config.get_text_config(decoder=True)
        found = getattr(text, "max_target_positions", None) or getattr(text, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def length(self, feature: Mapping[str, Any]) -> int:
        """Samples or frames of the sound."""
        return int(feature["sound"].length)

    def collate(self, features: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Sounds, padded to the longest; labels, or the inputs of a decoder where there are none."""
        batch = padded_sounds(self.processor.feature_extractor, features)
        if "labels" in features[0]:
            return {**batch, "labels": _padded([feature["labels"] for feature in features])}
        if not self.writes:
            return batch
        return {**batch, **self._decoder_inputs(batch, features)}

    def _decoder_inputs(
        self, batch: Mapping[str, Any], features: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """What a decoder reads where there are no targets: the words that the task's own model writes."""
        if any("own" not in feature for feature in features):
            with evaluating(self.model), torch.no_grad():
                written = self._write(self.model, to_device(batch, self.model))
            for feature, text in zip(features, written, strict=True):
                if isinstance(feature, dict):  # written once, for all passes over the data
                    feature.setdefault("own", self._tokens(text))
        labels = _padded([feature["own"] for feature in features])
        ids = with_decoder_inputs(self.model, {"labels": labels})["decoder_input_ids"]
        return {"decoder_input_ids": ids, "decoder_attention_mask": (labels != IGNORED).long()}

    # -- loss and divergence ------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """The model's own, a mean over examples also where the model adds them up."""
        loss: torch.Tensor = model(**batch).loss
        is_sum = not self.writes and getattr(self.config, "ctc_loss_reduction", None) == "sum"
        return loss / len(batch["labels"]) if is_sum else loss

    def positions(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The frames, or the tokens of the decoder, that are not padding."""
        logits = output.logits
        if self.writes:
            return [at_labels(logits, _decoder_labels(logits, batch))]
        where = self._frames(logits, batch).nonzero()
        return [(logits[where[:, 0], where[:, 1]], where[:, 0])]

    def _frames(self, logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Which frames are not padding, as bool (examples, frames)."""
        mask = frame_mask(self.model, batch.get("attention_mask"), logits.shape[1])
        return torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask

    def own_labels(self, output: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tokens of the model's own words; of a decoder, the likeliest at each position."""
        best = output.logits.argmax(-1)
        if self.writes:
            return {"labels": best.masked_fill(_decoder_labels(output.logits, batch) == IGNORED, IGNORED)}
        blank = self.config.pad_token_id
        kept = [ids[mask].tolist() for ids, mask in zip(best, self._frames(output.logits, batch), strict=True)]
        return {"labels": _padded([collapsed(ids, blank) for ids in kept]).to(best.device)}

    # -- answers ------------------------------------------------------------------------------------------------------

    def read(self, model: nn.Module, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """For each sound the likeliest token of each frame, NaN where the model answers NaN; or the words written."""
        best, ids = output.logits.float().max(-1)
        if self.writes:
            is_sound = best.isfinite().all(-1).tolist()
            texts = self._write(model, batch)
            return [text if ok else np.array([np.nan]) for text, ok in zip(texts, is_sound, strict=True)]
        marked = ids.double().masked_fill(~best.isfinite(), torch.nan)
        return [row[mask].cpu().numpy() for row, mask in zip(marked, self._frames(output.logits, batch), strict=True)]

    def _write(self, model: Any, batch: Mapping[str, Any]) -> list[str]:
        """What an encoder-decoder writes for the sounds of a batch, the likeliest token at each step."""
        sounds = {name: value for name, value in batch.items() if not name.startswith("decoder_") and name != "labels"}
        positions = self._positions()
        count = self.options.new_tokens if positions is None else min(self.options.new_tokens, positions - PROMPT)
        ids = model.generate(**sounds, max_new_tokens=max(1, count), do_sample=False, num_beams=1)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def predict(self, parts: Sequence[Any], features: Sequence[Mapping[str, Any]]) -> Any:
        """The words."""
        if isinstance(parts[0], str):
            return parts[0]
        tokenizer, ids = self.processor.tokenizer, parts[0].astype(np.int64).tolist()
        if not joins(tokenizer, self.config.pad_token_id):
            ids = collapsed(ids, self.config.pad_token_id)
        return str(tokenizer.decode(ids)).strip()

    def metrics(self, *, has_references: bool) -> tuple[Metric, ...]:
        """Word and character error rate; without targets against the words of the dense model."""
        return WORD_ERROR_RATE, CHARACTER_ERROR_RATE

    def shown(self, prediction: Any, parts: Sequence[Any]) -> dict[str, Any]:
        """The words."""
        return {"text": prediction}


PROMPT = 4
"""Positions of a decoder that its first tokens may take: start, language, task, no times."""


def collapsed(ids: Sequence[int], blank: int) -> list[int]:
    """What frames spell: equal neighbours as one, then without blanks (Graves et al., 2006)."""
    return [token for token, _ in groupby(ids) if token != blank]


def joins(tokenizer: Any, blank: int) -> bool:
    """Whether a tokenizer itself reads equal neighbours as one."""
    letter = next(
        i for i in range(len(tokenizer)) if i != blank and i not in tokenizer.all_special_ids and tokenizer.decode([i])
    )
    return bool(tokenizer.decode([letter, letter]) == tokenizer.decode([letter]))


def _repeats(ids: Sequence[int]) -> int:
    """How many tokens are those before them, between which CTC needs a blank."""
    return sum(a == b for a, b in pairwise(ids))


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Labels (examples, longest), at least one wide."""
    tensors = [torch.tensor(row if len(row) else [IGNORED], dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=IGNORED)


def _decoder_labels(logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Labels of a decoder's positions, `IGNORED` at padding; without labels, the likeliest tokens."""
    labels: torch.Tensor | None = batch.get("labels")
    if labels is not None:
        return labels
    mask = batch.get("decoder_attention_mask")
    best = logits.argmax(-1)
    return best if mask is None else best.masked_fill(mask == 0, IGNORED)
