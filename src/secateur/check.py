"""verify: the model with the plan's units zeroed and the model with them removed must say the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from secateur.errors import SecateurError
from secateur.host import Host
from secateur.plan import Plan

TOLERANCE = 1e-5
"""Largest permitted difference of an output, relative to the largest value of that output."""


class VerifyError(SecateurError):
    """Masked and shrunk models differ: the plan must not be applied."""


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    difference: the largest over all outputs, see `difference`.
    batches: how many were seen.
    inexact: why the models differ by design (hidden width between layer norms): only shape and finiteness count then.
    """

    difference: float
    batches: int
    inexact: str = ""


def verify(host: Host, plan: Plan, data: Iterable[Any], *, batches: int = 2, tolerance: float = TOLERANCE) -> Verdict:
    """Run masked and shrunk on real inputs; raise VerifyError when they differ by more than `tolerance` or give NaN.

    A host may have a method `contract(plan)`: how to translate inputs, which outputs count, and why removal is inexact.
    """
    contract = host.contract(plan) if hasattr(host, "contract") else None
    shrunk = host.copy()
    shrunk.resize(plan)
    worst, seen = 0.0, 0
    for raw_batch in islice(data, batches):
        batch = contract.before(raw_batch) if contract else raw_batch
        with host.masked(plan):
            expected = host.outputs(batch)
        if any(np.isnan(output).any() for output in expected):
            raise VerifyError("the masked model gives NaN; look for NaN or huge values in its weights")
        got = shrunk.outputs(contract.after(batch) if contract else batch)
        if any(np.isnan(output).any() for output in got):
            raise VerifyError("the shrunk model gives NaN where the masked one does not; nothing was saved")
        expected = contract.expected(expected, got) if contract else expected
        worst = max(worst, difference(expected, got))
        seen += 1
    if not seen:
        raise SecateurError("verify needs at least one batch of data")
    if contract and contract.inexact and np.isfinite(worst):
        return Verdict(worst, seen, contract.inexact)
    if not worst <= tolerance:
        raise VerifyError(
            f"masked and shrunk outputs differ by {worst:.2e} (permitted: {tolerance:.0e}); nothing was saved. "
            "Please report the model type; a hand-written layout can freeze the axis meanwhile"
        )
    return Verdict(worst, seen)


def difference(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """Largest difference of paired outputs, each in units of its largest absolute value; inf where shapes differ."""
    if len(expected) != len(got) or any(a.shape != b.shape for a, b in zip(expected, got, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return float("inf")
        if finite.any():
            largest, scale = (float(np.abs(x).max()) for x in (a[finite] - b[finite], a[finite]))
            if largest:
                worst = max(worst, largest / scale if scale else float("inf"))
    return worst
