"""verify: the model with the plan's units zeroed and the model with them removed must say the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from secateur.agreement import Agreement, AgreementError, compare
from secateur.errors import ModelError, SecateurError
from secateur.host import Host
from secateur.plan import Plan

TOLERANCE = 1e-5
"""Largest permitted error of an output element, relative to the larger of its own magnitude and the scale of the output
(`agreement.scale_of`). float32 has 24 bits, 6e-8; sums in another order, over some layers, leave about 1e-6 of the
scale, and a wrong unit changes an output by much more than 1e-5 of it."""

MOST_ROUNDING = 100.0
"""How many times `TOLERANCE` a difference may be and still be looked at in float64."""
DOUBLE_TOLERANCE = 1e-12
"""Largest permitted difference in float64, which has 53 bits, 1e-16: see `TOLERANCE`."""


class VerifyError(SecateurError):
    """Masked and shrunk models differ: the plan must not be applied."""


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    difference: the largest relative error of any output, see `secateur.agreement`.
    batches: how many were seen.
    inexact: why the models differ by design (hidden width between layer norms): only shape and finiteness count then.
    """

    difference: float
    batches: int
    inexact: str = ""


def verify(host: Host, plan: Plan, data: Iterable[Any], *, batches: int = 2, tolerance: float = TOLERANCE) -> Verdict:
    """Run masked and shrunk on real inputs, and compare every output (`secateur.agreement.compare`).

    A host may have a method `contract(plan)`: how to translate inputs, which outputs count, and why removal is inexact;
    a method `named_outputs(batch)`, for errors that name an output; and a method `in_double()`, which gives the host in
    float64. Where outputs differ by a little more than `tolerance`, and not at all in float64, that is rounding: norms
    of vectors that are almost constant, as those of padding, make it larger.

    Raises VerifyError when an output differs by more than `tolerance`, in its shape or in its integers, when either
    model gives NaN, and when there is no output to compare.
    """
    data = list(islice(data, batches))
    contract = host.contract(plan) if hasattr(host, "contract") else None
    shrunk = host.copy()
    shrunk.resize(plan)
    worst, seen = Agreement(), 0
    for raw_batch in data:
        batch = contract.before(raw_batch) if contract else raw_batch
        with host.masked(plan):
            expected = _outputs(host, batch)
        if any(np.isnan(output).any() for output in expected.values()):
            raise VerifyError("the masked model gives NaN; look for NaN or huge values in its weights")
        got = _outputs(shrunk, contract.after(batch) if contract else batch)
        if any(np.isnan(output).any() for output in got.values()):
            raise VerifyError("the shrunk model gives NaN where the masked one does not; nothing was saved")
        if contract and expected.keys() == got.keys():
            narrowed = contract.expected(list(expected.values()), list(got.values()))
            expected = dict(zip(expected, narrowed, strict=True))
            if contract.inexact:
                expected, got = (_measured(outputs) for outputs in (expected, got))
        try:
            found = compare(expected, got)
        except AgreementError as error:
            raise VerifyError(f"masked and shrunk models cannot be compared: {error}") from error
        worst, seen = max(worst, found, key=lambda agreement: agreement.error), seen + 1
    if not seen:
        raise SecateurError("verify needs at least one batch of data")
    if contract and contract.inexact and np.isfinite(worst.error):
        return Verdict(worst.error, seen, contract.inexact)
    if not worst.error <= tolerance and not _is_rounding(host, plan, data, worst.error / tolerance):
        raise VerifyError(
            f"masked and shrunk outputs differ by {worst.error:.2e} at {worst.where} (permitted: {tolerance:.0e}); "
            "nothing was saved. Please report the model type; a hand-written layout can freeze the axis meanwhile"
        )
    return Verdict(worst.error, seen)


def _is_rounding(host: Host, plan: Plan, data: list[Any], excess: float) -> bool:
    """Whether the models differ by rounding alone: nothing is left of the difference in float64.

    excess: the difference in float32, in units of what is permitted.
    """
    exact = host.in_double() if hasattr(host, "in_double") and excess <= MOST_ROUNDING else None
    if exact is None:
        return False
    try:
        verify(exact, plan, data, batches=len(data), tolerance=DOUBLE_TOLERANCE)
    except (VerifyError, RuntimeError):  # it differs, or has operations that know no float64
        return False
    return True


def difference(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest relative error of paired outputs (`secateur.agreement`); inf where they cannot be compared."""
    try:
        return compare(expected, got).error
    except AgreementError:
        return float("inf")


def check_reloaded(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """0.0, the difference of a reloaded model's outputs (`got`) from those of the saved one.

    Raises ModelError unless both are the same numbers. NaN is none, wherever it stands.
    """
    if not expected or any(np.isnan(output).any() for output in expected):
        raise ModelError("the model to be saved gives NaN, or nothing; look for NaN or huge values in its weights")
    gap = difference(expected, got)
    if gap != 0.0 or not all(map(np.array_equal, expected, got)):
        raise ModelError(f"the reloaded model differs from the saved one by {gap:.2e}; nothing was saved")
    return gap


def _outputs(host: Host, batch: Any) -> dict[str, np.ndarray]:
    """The outputs of a host by name, or by number where it does not name them."""
    if hasattr(host, "named_outputs"):
        return dict(host.named_outputs(batch))
    return {f"output {number}": output for number, output in enumerate(host.outputs(batch))}


def _measured(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs without integers: choices may fall otherwise where removal is inexact by design."""
    return {name: output for name, output in outputs.items() if output.dtype.kind not in "biu"}
