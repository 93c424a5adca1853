"""How far a program is from the model that it was made from, summed up over batches; no framework is needed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from secateur.agreement import Agreement, AgreementError, compare
from secateur.deploy.jobs.results import Parity

SHAPES_NAMED = 3
"""How many shapes an error names."""
HELD = 1 << 24
"""How many values are held before they are compared. The scale of an output is that of all values held, so that it does
not depend on how rows are put into batches."""


@dataclass
class Comparison:
    """Differences of each output over all data, by `secateur.agreement.compare`.

    reference: the framework that the program is compared with. error: the exception to raise.
    worst: the agreement of what has been compared, and values: how many values have been.
    equal, counted: answers that are the same, and all answers.
    """

    reference: str
    error: type[Exception]
    worst: Agreement = field(default_factory=Agreement)
    gap: float = 0.0
    values: int = 0
    equal: int = 0
    counted: int = 0
    examples: int = 0
    shapes: dict[str, None] = field(default_factory=dict)
    _held: list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = field(default_factory=list)

    def ran(self, shape: str, examples: int) -> None:
        """Note a batch."""
        self.shapes[shape] = None
        self.examples += examples

    def add(
        self,
        expected: Mapping[str, np.ndarray],
        got: Mapping[str, np.ndarray],
        *,
        ranked: Sequence[str] = (),
        mask: np.ndarray | None = None,
    ) -> None:
        """Take the outputs of one batch, by name. Raises the error for another number, other names or other shapes.

        ranked: outputs in which the largest of the last axis is an answer.
        mask: True at real positions (batch, length); of outputs with more values at each position, only those count.
        """
        for name in [*expected, *got]:
            a, b = expected.get(name), got.get(name)
            if a is None or b is None or a.shape != b.shape:
                given, wanted = (None if x is None else x.shape for x in (b, a))
                raise self.error(f"the program gives {name} as {given}, {self.reference} as {wanted}")
        expected, got = ({name: _real(array, mask) for name, array in x.items()} for x in (expected, got))
        for name in ranked:
            a, b = expected[name], got[name]
            if a.ndim and a.shape[-1] > 1:
                same = a.argmax(-1) == b.argmax(-1)
                self.equal, self.counted = self.equal + int(same.sum()), self.counted + same.size
        self._held.append((expected, got))
        if sum(array.size for held, _ in self._held for array in held.values()) >= HELD:
            self._compare()

    def _compare(self) -> None:
        """Compare what is held, every output over all its batches."""
        held, self._held = self._held, []
        names = list(dict.fromkeys(name for expected, _ in held for name in expected))
        joined = (
            {name: np.concatenate([pair[side][name].ravel() for pair in held if name in pair[side]]) for name in names}
            for side in (0, 1)
        )
        try:
            found = compare(*joined)
        except AgreementError as error:
            raise self.error(f"the program cannot be compared with {self.reference}: {error}") from error
        self.worst = max(self.worst, found, key=lambda agreement: agreement.error)
        self.gap, self.values = max(self.gap, found.gap), self.values + found.values

    def parity(self, tolerance: float) -> Parity:
        """The result. Raises the error without data or outputs, or for a relative error of more than `tolerance`."""
        if not self.shapes:
            raise self.error("parity needs at least one batch of data")
        if self._held:
            self._compare()
        relative = self.worst.error
        if not relative <= tolerance:
            raise self.error(
                f"the exported program differs from {self.reference} by {relative:.1e} of its {self.worst.output} "
                f"(permitted: {tolerance:.0e}), at shapes {_some(list(self.shapes))}; nothing was written"
            )
        agreement = self.equal / self.counted if self.counted else None
        return Parity(relative, self.gap, agreement, self.examples, list(self.shapes), tolerance)


def _real(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The values at real positions, of an output that has the positions of the mask and a value at each."""
    return array[mask] if mask is not None and array.ndim > 2 and array.shape[:2] == mask.shape else array


def _some(shapes: Sequence[str]) -> str:
    rest = f" and {len(shapes) - SHAPES_NAMED} more" if len(shapes) > SHAPES_NAMED else ""
    return ", ".join(shapes[:SHAPES_NAMED]) + rest
