"""Do two models say the same? One comparison of outputs, for `verify`, for reloaded folders and for runtimes.

An element is compared in units of max(scale of its output, its own magnitude): error = |a - b| / max(s, |a|). The scale
is a quantile of the magnitudes, not the largest, so that no single value hides the errors of the others.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from secateur.errors import SecateurError

QUANTILE = 0.9
"""The quantile of the magnitudes other than zero that is the scale of an output: nine in ten are not larger."""
FLOOR = 1e-3
"""Smallest scale, as a share of the largest magnitude that is no fill. float32 sums that make values of size L leave
rounding of some 1e-7 L, so that smaller units would tell rounding from nothing."""
FILL, GAP = 1e4, 100.0
"""Magnitudes from `FILL` on that are at least `GAP` times all smaller ones are fills: what models write where nothing
may be chosen (-1e4, -65504, -1e9, the lowest float32). They do not count in the scale, however many there are."""
PIECE = 1 << 20
"""How many values are compared at a time, which bounds the memory for temporary arrays."""
DEPTH = 32
"""How deep outputs may be nested."""


class AgreementError(SecateurError):
    """The outputs cannot be compared: other structures or shapes, or nothing to compare."""


@dataclass(frozen=True)
class Agreement:
    """How far outputs agree.

    error: the largest relative error; inf where integers, infinities or NaN differ, or a value where all must be zero.
    output, index: where it is; empty when everything is equal.
    gap: the largest absolute difference of finite values.
    values: how many values were compared; NaN on both sides is none.
    """

    error: float = 0.0
    output: str = ""
    index: tuple[int, ...] = ()
    gap: float = 0.0
    values: int = 0

    @property
    def where(self) -> str:
        """The worst place in words, e.g. "logits[3, 1]"."""
        return f"{self.output}[{', '.join(map(str, self.index))}]" if self.index else self.output


def compare(expected: Any, got: Any) -> Agreement:
    """Compare outputs of any structure (see `leaves`), element by element; `expected` gives the units.

    Integers and booleans must be equal, NaN and infinities stand at the same places with the same sign, and both parts
    of complex numbers count.

    Raises AgreementError, naming the output, for other structures or shapes, and when no value can be compared.
    """
    wanted, found = dict(leaves(expected)), dict(leaves(got))
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            raise AgreementError(f"{name} is an output of one model only ({len(wanted)} outputs against {len(found)})")
    for name, array in wanted.items():
        if array.shape != found[name].shape:
            raise AgreementError(f"{name} has shape {array.shape} in one model and {found[name].shape} in the other")
    results = [_array(name, array, found[name]) for name, array in wanted.items()]
    values = sum(result.values for result in results)
    if not values:
        raise AgreementError("the models give no numbers that could be compared; NaN proves nothing")
    worst = max(results, key=lambda result: result.error)
    return Agreement(worst.error, worst.output, worst.index, max(result.gap for result in results), values)


def leaves(
    value: Any, name: str = "", to_array: Callable[[Any], np.ndarray | None] = lambda value: None, depth: int = DEPTH
) -> Iterator[tuple[str, np.ndarray]]:
    """Every number of a structure by name, as numpy: mappings, sequences, named tuples, dataclasses, plain objects.

    to_array: the array of a tensor of a framework, or None for what is no tensor.

    None, text and caches (by the name of their class or key) are no outputs. Raises AgreementError for a structure that
    is nested without end.
    """
    array = np.asarray(value) if isinstance(value, bool | int | float | complex | np.generic) else value
    array = array if isinstance(array, np.ndarray) else to_array(value)
    if array is not None:
        yield name or "output", array
        return
    if not depth:
        raise AgreementError(f"{name} is nested in more than {DEPTH} levels; return plain tuples or dicts of tensors")
    for key, item in _items(value):
        path = f"{name}.{key}" if name else str(key) if isinstance(key, str) else f"output {key}"
        yield from leaves(item, path, to_array, depth - 1)


def _items(value: Any) -> list[tuple[Any, Any]]:
    """What a structure holds, by key; nothing of what is no structure."""
    if value is None or isinstance(value, str | bytes | type) or callable(value) or "Cache" in type(value).__name__:
        return []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        items = [(key, item) for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")]
    return [(key, item) for key, item in items if key != "past_key_values"]


def scale_of(reference: np.ndarray) -> float:
    """The unit of an output: see `QUANTILE`, `FILL` and `FLOOR`; 0 for an output of zeros.

    Where an output holds zeros and one fill, it is a mask, whose zeros must be zero.
    """
    magnitudes = np.abs(reference)
    zeros = bool((magnitudes == 0).any())
    magnitudes = magnitudes[(magnitudes > 0) & (magnitudes < math.inf)]
    low, high = magnitudes[magnitudes < FILL], magnitudes[magnitudes >= FILL]
    if high.size and low.size and high.min() >= GAP * float(low.max()):
        magnitudes = low
    elif high.size and not low.size and zeros and high.min() == high.max():
        return 0.0
    if not magnitudes.size:
        return 0.0
    place = min(math.ceil(QUANTILE * magnitudes.size), magnitudes.size) - 1
    return max(float(np.partition(magnitudes, place)[place]), FLOOR * float(magnitudes.max()))


def _array(name: str, expected: np.ndarray, got: np.ndarray) -> Agreement:
    """Compare arrays of one shape."""
    expected, got = _numbers(name, expected), _numbers(name, got)
    if expected.dtype.kind in "biu":
        differs = np.flatnonzero((expected != got).ravel())
        if differs.size:
            return Agreement(math.inf, name, _index(int(differs[0]), expected.shape), values=expected.size)
        return Agreement(values=expected.size)
    parts = 1
    if "c" in (expected.dtype.kind, got.dtype.kind):
        expected, got = (np.stack([x.real, x.imag], -1) for x in (expected, got))
        parts = 2
    shape, scale = expected.shape, scale_of(expected)
    expected, got = expected.ravel(), got.ravel()
    worst, place, gap, values = 0.0, -1, 0.0, 0
    for start in range(0, expected.size, PIECE):
        a, b = (x[start : start + PIECE].astype(np.float64) for x in (expected, got))
        errors, gaps, count = _errors(a, b, scale)
        highest = int(errors.argmax())
        if errors[highest] > worst:
            worst, place = float(errors[highest]), start + highest
        gap, values = max(gap, gaps), values + count
    if place < 0:
        return Agreement(gap=gap, values=values)
    index = _index(place, shape)
    return Agreement(worst, name, index[:-1] if parts == 2 else index, gap, values)


def _errors(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray, float, int]:
    """Relative errors of float64 vectors, their largest difference, and how many values are numbers."""
    finite = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        gaps = np.abs(a - b)
        errors = np.where(finite, gaps / np.maximum(scale, np.abs(a)), math.inf)
    errors[same] = 0.0
    return errors, float(gaps[finite].max(initial=0.0)), int(a.size - np.isnan(a[same]).sum())


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    """The array, in float32 where numpy does not know its numbers (bfloat16). Raises AgreementError for no numbers."""
    if array.dtype.kind in "biufc":
        return array
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise AgreementError(f"{name} holds {array.dtype}, which are no numbers") from error


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(place, shape))
