"""Word and character error rates, counted by hand."""

import numpy as np
import pytest

from secateur.metrics.drop import drop
from secateur.metrics.transcripts import CHARACTER_ERROR_RATE, WORD_ERROR_RATE, characters, words


def test_rows_are_counted_by_hand():
    references = ["the cat sat", "a b", "", "x"]
    predictions = ["the hat  sat down", "", "new words", "x"]
    assert words(predictions, references).tolist() == [[2, 3], [2, 2], [2, 0], [0, 1]]
    assert characters(["cut", "", "ab"], ["cat", "ab", ""]).tolist() == [[1, 3], [2, 2], [2, 0]]


def test_the_rate_is_that_of_the_sums():
    table = words(["a x", "b c d e f g h i"], ["a b", "b c d e f g h i"])
    assert WORD_ERROR_RATE.whole(table) == pytest.approx(1 / 10)
    assert WORD_ERROR_RATE.whole(table[:1]) == 0.5
    assert WORD_ERROR_RATE.whole(words(["a b", ""], ["", ""])) == 2.0
    assert not WORD_ERROR_RATE.is_higher_better
    assert not CHARACTER_ERROR_RATE.is_higher_better


def test_more_errors_are_a_drop():
    references = ["a b c d"] * 20
    dense, pruned = words(references, references), words(["a b x"] * 20, references)
    found = drop(WORD_ERROR_RATE, dense, pruned)
    assert (found.dense, found.pruned, found.drop) == (0.0, 0.5, 0.5)
    assert found.interval == (0.5, 0.5)
    assert found.reading == "the pruned model is worse"


def test_the_same_as_jiwer_for_a_whole_text():
    import jiwer

    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(list("abc"), rng.integers(1, 6))) for _ in range(30)] for _ in range(2)]
    assert WORD_ERROR_RATE.whole(words(*texts)) == pytest.approx(jiwer.wer(texts[1], texts[0]))
    assert CHARACTER_ERROR_RATE.whole(characters(*texts)) == pytest.approx(jiwer.cer(texts[1], texts[0]))
