"""What a number of rows says about how often two models agree: exact bounds of the binomial distribution.

Errors of a cascade can only become more as its threshold falls. So the lowest threshold which is certified, with all
higher ones, may be chosen on the very rows that certify it: the bound holds as if it had been fixed before. Sources:
Clopper and Pearson, 1934; Bates et al., "Distribution-free, risk-controlling prediction sets", 2021.
"""

import math

import numpy as np

from secateur.errors import DataError, ModelError


def tail(rows: int, errors: int, rate: float) -> float:
    """The probability of at most that many errors in so many independent rows, each wrong with probability `rate`."""
    if errors >= rows or rate <= 0:
        return 1.0
    if errors < 0 or rate >= 1:
        return 0.0
    counts = np.arange(errors)
    odds = np.log((rows - counts) / (counts + 1)) + math.log(rate) - math.log1p(-rate)
    logs = rows * math.log1p(-rate) + np.concatenate([[0.0], np.cumsum(odds)])
    return float(min(1.0, np.exp(logs).sum()))


def lower_bound(rows: int, errors: int, sure: float) -> float:
    """The share of right rows that is certain with the probability `sure` after that many errors (one-sided)."""
    if errors >= rows:
        return 0.0
    low, high = 0.0, 1.0  # of the error rate, whose tail falls
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(rows, errors, middle) > 1 - sure else (low, middle)
    return 1 - high


def most_errors(rows: int, wanted: float, sure: float) -> int:
    """How many errors in so many rows still certify that a share of `wanted` is right; -1 where no rows do."""
    low, high = -1, rows  # the tail grows with the errors
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tail(rows, middle, 1 - wanted) <= 1 - sure + 1e-12 else (low, middle)
    return low


def rows_needed(wanted: float, sure: float) -> int:
    """How many rows without an error certify that a share of `wanted` is right."""
    return math.ceil(math.log(1 - sure) / math.log(wanted) - 1e-9)


def check_wanted(wanted: float, sure: float) -> None:
    """DataError unless both are shares between 0 and 1."""
    for name, share in (("agreement", wanted), ("sure", sure)):
        if not 0 < share < 1:
            raise DataError(f"{name} {share:g} is no share that rows can certify; give one between 0 and 1, as 0.99")


def certified_threshold(confidence: np.ndarray, agrees: np.ndarray, wanted: float, sure: float) -> float:
    """The lowest threshold above which cheap answers may stand, so that a share of `wanted` of all rows is answered as
    by the whole model, with the probability `sure` over the draw of these rows.

    confidence: (rows,) of the cheap answers. agrees: (rows,) whether each is that of the whole model. A row whose
    confidence is below the threshold is answered by the whole model, and then is no error.

    Raises DataError for too few rows, ModelError where the surest answer of all is wrong too often.
    """
    check_wanted(wanted, sure)
    rows, share = len(confidence), f"{100 * wanted:g}% agreement with a probability of {100 * sure:g}%"
    permitted = most_errors(rows, wanted, sure)
    if permitted < 0:
        raise DataError(
            f"{rows} rows cannot certify {share}: it takes {rows_needed(wanted, sure)} rows without a disagreement; "
            "give more rows, ask for less agreement, or name the share of the rows to escalate"
        )
    wrong = np.sort(confidence[~agrees])[::-1]
    if len(wrong) <= permitted:
        return 0.0
    bar = wrong[permitted]
    above = confidence[confidence > bar]
    if not len(above):
        raise ModelError(
            f"no threshold certifies {share}: the surest of {rows} rows are answered otherwise by the whole model; "
            "leave more tokens to the cheap pass, or ask for less agreement"
        )
    nearest = float(above.min())
    middle = (float(bar) + nearest) / 2  # away from both, as runtimes round differently
    return middle if middle > bar else nearest
