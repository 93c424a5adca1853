"""Stages of a search in which single zeros go beside units: what is chosen, and what it is expected to take.

Everything else, from the measurement that corrects the times to the report, is as without zeros.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.deploy.jobs.export import tokenizer_of
from secateur.deploy.jobs.timing import Say
from secateur.deploy.runner import sizes_for
from secateur.deploy.target import DeployError
from secateur.deploy.targets.inputs import inputs_of, ports_of, positions_of, tensors
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.search.build import RIDGES
from secateur.search.candidate import Candidate
from secateur.search.choosing.chooser import Chosen
from secateur.search.choosing.trial import Key, key_of
from secateur.search.costs import Cost
from secateur.search.levels import METHODS
from secateur.search.sparse.densities import Losses
from secateur.search.sparse.mixed import choose_mixed, mixed_plan
from secateur.search.sparse.times import SparseTimes, kernel_times
from secateur.search.stages import Stages
from secateur.search.target import Call
from secateur.torch.host import TorchHost


@dataclass(frozen=True, kw_only=True)
class MixedCost(Cost):
    """The latency of units and zeros together, which no sum over axes gives. times: as they were first measured."""

    times: SparseTimes
    layout: Layout

    def of(self, candidate: Candidate) -> float:
        """The predicted latency of a candidate, relative to the dense model."""
        units = Plan({axis: np.arange(count) for axis, count in candidate.kept.items()})
        return self.corrected_times.of(self.layout, units, candidate.densities) / self.dense

    @property
    def bound_ms(self) -> float:
        """The most milliseconds that a candidate may take."""
        return self.bound * self.dense

    @property
    def corrected_times(self) -> SparseTimes:
        """The times after the measurements so far."""
        return self.times.corrected(self.correction)


class MixedStages(Stages):
    """Stages for a target with zeros: candidates have densities, and one latency is their cost."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._losses: Losses = {}
        self._latest: tuple[tuple[Key, str, float], Plan] | None = None
        super().__init__(*args, **options)

    def watched(self) -> Sequence[str]:
        """The weights that zeros may go into."""
        return default_weights(self.host.layout)

    def priced(self) -> Sequence[Cost]:
        """The latency on the sparse kernels."""
        limit = self.target.limits[0]
        assert limit.call is not None
        times = times_at(self.host, self.dense_folder(), limit.call, self.say)
        return [MixedCost(limit, times.dense_ms, {}, {}, times=times, layout=self.host.layout)]

    def ranked(self, costs: Sequence[Cost], wanted: float | None = None) -> Chosen:
        """The units and densities within the latency that diverge least; `wanted` does not change them."""
        (cost,) = costs
        assert isinstance(cost, MixedCost)
        method, ridge = METHODS[0], RIDGES[0]
        with self.timed("choice"):
            best, seen = choose_mixed(
                self.host,
                self.task,
                self.rows.search,
                self.levels[method],
                self.stats,
                cost.corrected_times,
                cost.bound_ms,
                ridge=ridge,
                reference=self.reference,
                cache=self._losses,
            )
            tried = ", ".join(f"{share:.0%} {divergence:.4g}" for share, divergence in seen.items())
            self.say(f"divergence by the share of the time that units give up: {tried}")
            divergence = self.trial(method, ridge).divergence(best.candidate)
        return Chosen(best.candidate, method, ridge, divergence)

    def refined(self, chosen: Chosen, costs: Sequence[Cost]) -> Chosen:
        """The choice itself: a local search moves units alone, and the zeros would no longer fit them."""
        return chosen

    def plan_of(self, candidate: Candidate, method: str, ridge: float) -> Plan:
        """The plan of units and zeros; the latest one is kept, as its repair takes long."""
        key = key_of(candidate), method, ridge
        if self._latest is None or self._latest[0] != key:
            self._latest = key, mixed_plan(self.host, self.levels[method], self.stats, candidate, ridge)
        return self._latest[1]


# -- times ------------------------------------------------------------------------------------------------------------


def times_at(host: TorchHost, folder: Path, call: Call, say: Say = lambda text: None) -> SparseTimes:
    """The times of a model on the sparse kernels at a call, from the cache where they are there.

    folder: where the model was saved, with its tokenizer or processor.

    Raises DeployError when the model cannot run on the kernels or at the call, and when zeros do not save time.
    """
    timed = host.copy()
    timed.model.to("cpu", torch.float32)  # as the runtime opens it
    with on_threads(call.threads):
        times = kernel_times(timed, made_up(timed, folder, call), say=say)
    if times.per_weight <= 0:  # calls so small that noise is all that is seen
        raise DeployError(
            f"zeros save no time that can be measured at calls of {call.batch} x {call.length}; make --batch or "
            "--length larger, or leave --zeros out"
        )
    return times


def made_up(host: TorchHost, folder: Path, call: Call) -> dict[str, Any]:
    """The inputs that a call of a runtime is timed with: made up, without padding. folder: see `times_at`.

    Raises DeployError when the model has too few positions.
    """
    positions = positions_of(host.model)
    if positions is not None and call.length > positions:
        raise DeployError(f"length {call.length} is more than the {positions} positions of the model; lower --length")
    inputs = inputs_of(host.model, tokenizer_of(folder), folder)
    return tensors(ports_of(host.model, inputs), sizes_for({}, call.batch, call.length))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Pins torch to a number of threads for as long as the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
