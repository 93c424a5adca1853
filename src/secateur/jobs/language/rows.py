"""A language model and the dense one on a text, as they are and with weights rounded to fewer bits: is pruning better
than rounding? On request with their speeds on llama.cpp.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.deploy.gguf.export import require, write_for_times
from secateur.deploy.gguf.generate import Speed, file_of, speeds
from secateur.deploy.gguf.rounded import round_weights
from secateur.deploy.target import DeployError
from secateur.records.model import weight_bytes
from secateur.scores import TextScore, interval_of, text_score
from secateur.torch.data.run_windows import Answers, evaluate_text, recorded
from secateur.torch.data.text_rows import load_tokenizer, text_positions
from secateur.torch.data.token_windows import check_context, cut, tokens_of
from secateur.torch.open import load_model

DENSE, THIS = "dense", "this model"
FORMATS = ("q8_0", "q4_0")
"""Of 8 and of 4 bits: the formats of the rows unless others are asked for."""
HALF = "f16"
"""The format in which a model that is not rounded is timed."""
PROMPT, NEW_TOKENS = 128, 64
"""Of the timing: how many tokens are read and written, at most half and a quarter of what the models take."""

Track = Callable[[list[Any], str], Any]
"""Wraps a list, with a word for its items, to show progress."""


@dataclass(frozen=True)
class Models:
    """What is compared.

    model, reference: folders or hub ids of the model, and of the dense one where there is one.
    options: for loading both.
    formats: of GGUF, in each of which both are scored too.
    threads: with how many they are timed on llama.cpp; None to time nothing.
    """

    model: str
    reference: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    formats: Sequence[str] = ()
    threads: int | None = None

    def load(self, source: str) -> Any:
        """One of the two."""
        return load_model(source, **self.options)


@dataclass(frozen=True)
class Text:
    """What models are scored on. name: for messages. context: tokens of a window. samples: windows; None for all."""

    name: str
    documents: Sequence[str]
    context: int
    samples: int | None = None

    def windows(self, tokenizer: Any, model: Any) -> torch.Tensor:
        """Windows (count, context); DataError where they do not fit the model, or the text is too short."""
        check_context(text_positions(model), self.context)
        most = None if self.samples is None else self.samples * self.context
        tokens = tokens_of(tokenizer, self.documents, model.get_input_embeddings().weight.shape[0], most)
        return cut(tokens, self.context, self.name, self.samples)


@dataclass(frozen=True)
class Row:
    """One model in one form on the text.

    whose: "dense" or "this model". form: how its weights are stored: float32, or a format of GGUF.
    bytes: of the weights: of the files of a folder, or of the tensors of a GGUF file.
    score: beside the dense model; that of the dense model itself stands alone.
    speed: on llama.cpp, where it was timed.
    """

    whose: str
    form: str
    bytes: int
    score: TextScore
    speed: Speed | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.whose} {self.form}"


@dataclass(frozen=True)
class Compared:
    """Rows, those of the dense model first. notes: sentences on the timing."""

    rows: list[Row]
    notes: list[str]

    @property
    def score(self) -> TextScore:
        """That of the model as it is."""
        return next(row.score for row in self.rows if row.whose == THIS)


def compare(models: Models, text: Text, track: Track = lambda items, what: items) -> Compared:
    """Score a model and the dense one on a text, as they are and in each format. Without a dense model, the formats are
    compared with the model itself.

    Rounding is that of llama.cpp's files; activations stay as they are. No more than two models are in memory.

    Raises DeployError for a format that does not exist or a missing extra, and as `evaluate_text` and `Text.windows`.
    """
    if models.formats or models.threads is not None:
        require()
    tokenizer = load_tokenizer(models.model, **models.options)
    model = models.load(models.model)
    windows = text.windows(tokenizer, model)
    with tempfile.TemporaryDirectory(prefix="secateur-") as place:
        files = _Files(models, tokenizer, Path(place))
        if models.reference is None:
            rows = [_unrounded(THIS, models.model, model, evaluate_text(model, windows, None, _said(track, THIS)))]
            files.write(THIS, model)
            answers = recorded(model, windows, _said(track, THIS)) if models.formats else None
        else:
            dense = models.load(models.reference)
            answers = recorded(dense, windows, _said(track, DENSE))
            score = evaluate_text(model, windows, answers, _said(track, THIS))
            own = text_score(np.array(score.dense_losses), windows.numpy())
            rows = [_unrounded(DENSE, models.reference, dense, own), _unrounded(THIS, models.model, model, score)]
            files.write(DENSE, dense)
            files.write(THIS, model)
            del model
        rows += _rounded(models, windows, answers, track)
        times = files.timed()
    rows = [
        replace(row, speed=times.get((row.whose, row.form if row.form in models.formats else HALF))) for row in rows
    ]
    return Compared(sorted(rows, key=lambda row: row.whose != DENSE), files.notes)


def _unrounded(whose: str, source: str, model: Any, score: TextScore) -> Row:
    parameters = list(model.parameters())
    size = weight_bytes(source) or sum(p.numel() * p.element_size() for p in parameters)
    return Row(whose, str(parameters[0].dtype).removeprefix("torch."), size, score)


def _rounded(models: Models, windows: torch.Tensor, answers: Answers | None, track: Track) -> Iterator[Row]:
    """The rows with fewer bits. answers: of the dense model."""
    both = [] if models.reference is None else [(DENSE, models.reference)]
    for whose, source in (*both, (THIS, models.model)):
        for form in models.formats:
            model = models.load(source)
            size = round_weights(model, form)
            yield Row(whose, form, size, evaluate_text(model, windows, answers, _said(track, f"{whose} {form}")))
            del model


def _said(track: Track, whose: str) -> Track:
    """Progress that says which model runs."""
    return lambda items, what: track(items, f"{what}, {whose}")


class _Files:
    """The GGUF files that are timed, and what there is to say of it. Nothing where nothing is timed."""

    def __init__(self, models: Models, tokenizer: Any, place: Path) -> None:
        self._models, self._tokenizer, self._place = models, tokenizer, place
        self._folders: dict[tuple[str, str], Path] = {}
        self.notes: list[str] = []

    def write(self, whose: str, model: Any) -> None:
        """Write a model in half precision and in each format; a note where GGUF cannot hold it."""
        if self._models.threads is None:
            return
        try:
            for form in dict.fromkeys((HALF, *self._models.formats)):
                folder = self._place / f"{whose} {form}"
                self._folders[whose, form] = write_for_times(model, self._tokenizer, folder, quantize=form)
        except DeployError as error:
            self.notes.append(f"{whose} was not timed: {error}")

    def timed(self) -> dict[tuple[str, str], Speed]:
        """The speeds of all files, in turn: (whose, format) -> speed."""
        if not self._folders:
            return {}
        most = min(file_of(folder)[1] for folder in self._folders.values())
        prompt, new = min(PROMPT, most // 2), min(NEW_TOKENS, most // 4)
        threads = self._models.threads or 1
        named = {folder.name: folder for folder in self._folders.values()}
        found = speeds(named, prompt, new, threads=threads)
        self.notes.append(
            f"speeds: llama.cpp, {threads} thread{'' if threads == 1 else 's'}, models in turn, {prompt} tokens read "
            f"and {new} written; what is not rounded was timed as {HALF}"
        )
        return {key: found[folder.name] for key, folder in self._folders.items()}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row of the model: whether the best dense row that takes no more bytes is better. The
    difference in loss is paired over windows, with its 95% interval; without rows of both models there is none.
    """
    dense = [row for row in rows if row.whose == DENSE]
    return [_verdict(row, dense) for row in rows if row.whose == THIS and len(dense) > 1]


def _verdict(row: Row, dense: Sequence[Row]) -> str:
    """The sentence for one row of the model."""
    smaller = [other for other in dense if other.bytes <= row.bytes]
    if smaller:
        beside = min(smaller, key=lambda one: one.score.loss)
    else:
        beside = min(dense, key=lambda one: one.bytes)
    difference = np.array(row.score.losses) - np.array(beside.score.losses)
    low, high = interval_of(difference) or (-math.inf, math.inf)  # a single window shows nothing
    loss = f"{difference.mean():+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else "")
    size = "as large" if row.bytes == beside.bytes else "smaller"
    if not smaller:
        words = "this model is smaller than every dense row"
    elif low > 0:
        words = f"the dense model is {size} and better"
    elif high < 0:
        words = f"the dense model is {size}, but worse"
    else:
        words = f"the dense model is {size}, and the text shows no difference"
    return f"{_sized(row)} beside {_sized(beside)}: loss {loss}; {words}"


def _sized(row: Row) -> str:
    return f"{row.name} ({row.bytes / 1e6:.1f} MB)"
