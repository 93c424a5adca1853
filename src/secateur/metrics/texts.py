"""Metrics of texts: perplexity and token accuracy; chrF and BLEU, computed by sacrebleu; exact match.

Sources: Popovic, 2015 (chrF); Papineni et al., 2002, and Post, 2018 (BLEU). Nothing is fetched: BLEU takes the 13a
tokenizer.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.metrics.metric import Metric, equal, mean, ratio

LARGEST_LOSS = 700.0
"""Mean losses in nats beyond this have an infinite perplexity."""

# -- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a model answers at the positions of a text.

    answers: the most likely token at each position, (positions,).
    loss: the negative log-likelihood of the right tokens, summed, in nats; 0 where they are not known.
    """

    answers: np.ndarray
    loss: float = 0.0


def perplexity_of(loss: float) -> float:
    """The exponential of a mean loss in nats; infinity where it is too large for a float."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def _losses(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """Summed loss and number of tokens of each text."""
    return np.array([(p.loss, len(r)) for p, r in zip(predictions, references, strict=True)], np.float64)


def _perplexity(table: np.ndarray) -> float:
    return perplexity_of(ratio(table))


def _hits(predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """How many tokens of each text are right, and how many there are. references: token ids, or `Tokens`."""
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        wanted = reference.answers if isinstance(reference, Tokens) else np.asarray(reference)
        rows.append((int((prediction.answers == wanted).sum()), len(wanted)))
    return np.array(rows, np.float64)


PERPLEXITY = Metric(
    "perplexity", is_higher_better=False, rows=_losses, whole=_perplexity, point=0.01, is_point_relative=True
)
"""exp(mean loss of a token); predictions are `Tokens`, references token ids. A point is 1% of the dense model's."""
PSEUDO_PERPLEXITY = Metric(
    "pseudo-perplexity", is_higher_better=False, rows=_losses, whole=_perplexity, point=0.01, is_point_relative=True
)
"""exp(mean loss of a masked token), after Salazar et al., 2020, who mask one token at a time."""
TOKEN_ACCURACY = Metric("token accuracy", is_higher_better=True, rows=_hits, whole=ratio)
"""The share of tokens that are the most likely ones; references are token ids, or the `Tokens` of another model."""

# -- whole texts ------------------------------------------------------------------------------------------------------


@functools.cache
def _scorer(name: str) -> Any:
    """A metric of sacrebleu: BLEU or CHRF."""
    import sacrebleu.metrics as known  # optional

    return known.BLEU(tokenize="13a", force=True) if name == "BLEU" else known.CHRF()


def _statistics(name: str, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The counts of n-grams of each text, as sacrebleu sums them for a whole corpus, and whether it is right."""
    counts = _scorer(name)._extract_corpus_statistics(list(predictions), [list(references)])
    return np.concatenate([np.array(counts, np.float64), equal(predictions, references)], 1)


def _score(name: str, table: np.ndarray) -> float:
    """The score of a corpus from the counts of its texts; without any n-gram, the share of right texts."""
    sums = [int(count) for count in table[:, :-1].sum(0)]
    if not any(sums):
        return 100 * float(table[:, -1].mean())
    return float(_scorer(name)._compute_score_from_stats(sums).score)


def _of_sacrebleu(label: str, name: str) -> Metric:
    return Metric(
        label,
        is_higher_better=True,
        rows=functools.partial(_statistics, name),
        whole=functools.partial(_score, name),
        point=1.0,
    )


CHRF = _of_sacrebleu("chrF", "CHRF")
BLEU = _of_sacrebleu("BLEU", "BLEU")
EXACT = Metric("exact match", is_higher_better=True, rows=equal, whole=mean)
TEXTS = (CHRF, BLEU, EXACT)
"""Predictions and references are texts."""
