"""Stages of a search, each done once: statistics and levels, a choice that meets the costs as measured, healing, and
the measurement of the saved model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.search.candidate import Candidate

MISSED = 0.03
"""A result is measured this close to what was asked, or the cost is corrected and the sizes are chosen again."""
CORRECTIONS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a search goes about it.

    heal_seconds: the most that healing takes; 0 for none. search_seconds: the most that the local search takes.
    seed: of the local search and of healing.
    save_options: for `TorchHost.save`.
    """

    heal_seconds: float = 1800.0
    search_seconds: float = 60.0
    seed: int = 0
    save_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A candidate with the method that ordered its units, and its divergence on the search rows."""

    candidate: Candidate
    method: str
    divergence: float
