"""Trial: the true divergence of candidates from the dense model, on the search rows.

A unit contributes through the weights that read it, so it is enough to write those with zeros where it was: nothing is
resized, and going on to the next candidate writes a few matrices.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.search.candidate import Candidate
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, Track, divergences_of, silent
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost
from secateur.torch.shrink.masking import bypassed

Key = tuple[tuple[tuple[str, object], ...], ...]


class Trial:
    """Measures candidates on a working copy of the host, each batch once for each candidate.

    host: the dense model; it is not changed.
    batches: the search rows. Their first n in an order drawn by `seed` are what a measurement on n batches sees.
    plan_of: makes the plan of a candidate, its new weights included.
    reference: the dense model on these batches, if it has run.
    """

    def __init__(
        self,
        host: TorchHost,
        task: Task,
        batches: Batches,
        plan_of: Callable[[Candidate], Plan],
        *,
        reference: Reference | None = None,
        seed: int = 0,
        track: Track = silent,
    ) -> None:
        if reference is not None and reference.batches is not batches:
            raise PlanError("the reference has run on other batches than those of the trial; pass the same batches")
        self.reference = Reference(task, host.model, batches, track) if reference is None else reference
        self.batches, self.task, self.plan_of = batches, task, plan_of
        self._host, self._copy = host, host.copy()
        self._order = np.random.default_rng(seed).permutation(len(batches)).tolist()
        self._seen: dict[Key, list[np.ndarray]] = {}
        self.forward_passes = 0
        """Batches that have run so far, without those of the reference."""

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._order)

    def divergence(self, candidate: Candidate, batches: int | None = None) -> float:
        """The mean divergence over the examples of the first so many batches; all of them by default."""
        return float(self.per_example(candidate, batches).mean())

    def per_example(self, candidate: Candidate, batches: int | None = None) -> np.ndarray:
        """The divergence of each example, (examples,), in an order that is the same for every candidate.

        batches: how many of the batches; fewer are always the first ones of more.

        NaN, where a model computes it, counts as infinite.
        """
        wanted = len(self) if batches is None else max(1, min(batches, len(self)))
        seen = self._seen.setdefault(key_of(candidate), [])
        if len(seen) < wanted:
            with self.written(candidate) as model:
                for number in self._order[len(seen) : wanted]:
                    values = divergences_of(self.task, model.model, self.batches, number, self.reference)
                    seen.append(np.where(np.isnan(values), np.inf, values))
                    self.forward_passes += 1
        return np.concatenate(seen[:wanted])

    @contextlib.contextmanager
    def written(self, candidate: Candidate) -> Iterator[TorchHost]:
        """The working copy as the candidate for as long as the context lasts: masked, of unchanged shapes."""
        plan = self.plan_of(candidate).check(self._copy.layout)
        names = weights_of(self._copy, plan)
        try:
            for name in names:
                if name in plan.weights:
                    self._copy.write(name, plan.weights[name])
                mask = plan.mask(self._copy.layout, name)
                if mask is not None:
                    target = self._copy.read(name)
                    target.masked_fill_(~torch.from_numpy(mask).to(target.device), 0)
            with bypassed(self._copy.model, self._copy.layout, plan):
                yield self._copy
        finally:
            for name in names:
                self._copy.write(name, self._host.read(name))


def weights_of(host: TorchHost, plan: Plan) -> list[str]:
    """The parameters whose zeros make a model compute what it computes without the plan's units.

    These are the linear weights that read an axis, or everything that carries it where none does (query and key
    dimensions), and what the plan masks or gives new weights. Removed layers and experts need no zeros.
    """
    found = {*plan.weights, *plan.masks}
    layout = host.layout
    for axis, units in plan.keep.items():
        if len(units) == layout.axis(axis).size or layout.axis(axis).path:
            continue
        readers = [name for name in layout.linears if layout.carries(name, axis) and layout.reads(name, axis)]
        found.update(readers or [name for name in layout.params if layout.carries(name, axis)])
    return [name for name in layout.params if name in found and plan_keeps(host, plan, name)]


def plan_keeps(host: TorchHost, plan: Plan, param: str) -> bool:
    """Whether a parameter remains, whole or in part: it lies in no layer or expert that goes."""
    return host.layout.kept(param, plan.keep) is not None


def key_of(candidate: Candidate) -> Key:
    """What tells candidates apart."""
    return tuple(tuple(sorted(part.items())) for part in (candidate.kept, candidate.dropped, candidate.densities))


def is_better(first: np.ndarray, second: np.ndarray, errors: float = 2.0) -> bool:
    """Whether the first of two models diverges less on the same examples, beyond `errors` paired standard errors."""
    difference = np.asarray(first) - np.asarray(second)
    if not np.isfinite(difference).all():
        return bool(np.isfinite(first).all() and not np.isfinite(second).all())
    if len(difference) < 2:
        return False
    return bool(difference.mean() + errors * difference.std(ddof=1) / len(difference) ** 0.5 < 0)


def best_of(trial: Trial, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of least divergence: half of them go each time the number of batches doubles.

    Source: Sieberling et al., 2024 (EvoPress), for the growing samples.
    """
    left, batches = list(candidates), max(1, len(trial) >> max(0, len(candidates) - 1).bit_length())
    while len(left) > 1:
        left.sort(key=lambda candidate: trial.divergence(candidate, batches))
        if batches >= len(trial):
            break
        left, batches = left[: -(-len(left) // 2)], min(2 * batches, len(trial))
    return left[0]
