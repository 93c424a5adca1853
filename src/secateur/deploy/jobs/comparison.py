"""How far a program is from the model that it was made from, summed up over batches; no framework is needed here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from secateur.deploy.jobs.results import Parity

SHAPES_NAMED = 3
"""How many shapes an error names."""


@dataclass
class Comparison:
    """Differences of each output over all data, which do not depend on how rows are put into batches.

    gaps: largest absolute difference of an output, and largest: its largest magnitude.
    equal, counted: answers that are the same, and all answers.
    """

    gaps: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    equal: int = 0
    counted: int = 0
    examples: int = 0
    shapes: dict[str, None] = field(default_factory=dict)

    def ran(self, shape: str, examples: int) -> None:
        """Note a batch."""
        self.shapes[shape] = None
        self.examples += examples

    def add(self, name: str, expected: np.ndarray, got: np.ndarray, *, ranked: bool) -> None:
        """Compare an output of one batch, arrays of one shape. ranked: the largest of the last axis is an answer."""
        gap = float(np.abs(expected - got).max()) if np.isfinite(got).all() else float("inf")
        self.gaps[name] = max(self.gaps.get(name, 0.0), gap)
        self.largest[name] = max(self.largest.get(name, 1e-30), float(np.abs(expected).max()))
        if ranked and expected.shape[-1] > 1:
            same = expected.argmax(-1) == got.argmax(-1)
            self.equal, self.counted = self.equal + int(same.sum()), self.counted + same.size

    def parity(self, tolerance: float, reference: str, error: type[Exception]) -> Parity:
        """The result. Raises `error` without data, or for more than `tolerance` of an output's largest magnitude."""
        if not self.shapes:
            raise error("parity needs at least one batch of data")
        relative = max((gap / self.largest[name] for name, gap in self.gaps.items()), default=0.0)
        if not relative <= tolerance:
            raise error(
                f"the exported program differs from {reference} by {relative:.1e} of its outputs (permitted: "
                f"{tolerance:.0e}), at shapes {_some(list(self.shapes))}; nothing was written"
            )
        agreement = self.equal / self.counted if self.counted else None
        worst = max(self.gaps.values(), default=0.0)
        return Parity(relative, worst, agreement, self.examples, list(self.shapes), tolerance)


def _some(shapes: Sequence[str]) -> str:
    rest = f" and {len(shapes) - SHAPES_NAMED} more" if len(shapes) > SHAPES_NAMED else ""
    return ", ".join(shapes[:SHAPES_NAMED]) + rest
