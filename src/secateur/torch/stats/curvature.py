"""The curvature of a task's divergence at the weights behind prunable axes, from one backward pass a batch.

Only activations get gradients. For each linear weight that reads an axis: inputs weighted by the squared gradient at
the output, products of that gradient, and the gradient of a gate on each unit, squared for each example.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.errors import DataError
from secateur.layout import Layout
from secateur.repair.removable import Removable, removable
from secateur.stats import Stats, Tally
from secateur.torch.base.batches import evaluating, run, size_of, to_device, with_decoder_inputs
from secateur.torch.stats.linear_inputs import input_of, linear_modules
from secateur.torch.stats.padding import Padding

Score = Callable[[Any, Any, torch.Generator], torch.Tensor]
"""(output, batch, generator) -> a scalar, as `Task.fisher_loss`."""


def collect_curvature(
    model: nn.Module,
    layout: Layout,
    data: Iterable[Any],
    score: Score,
    examples_of: Callable[[Any], int] = size_of,
    *,
    weights: Collection[str] = (),
    seed: int = 0,
    first: int = 0,
) -> Stats:
    """Sum "fisher_in", "fisher_mean", "fisher_out" and "fisher_gate" over the batches, in evaluation mode.

    score: see `Score`; its terms of different examples have mean zero and are independent.
    examples_of: how many examples a batch has, as the divergence counts them.
    weights: linear weights whose matrices are wanted beside those behind axes; those that no module of their own
        multiplies by, or that are no matrices, are left out.
    seed: of the draws of `score`. first: the number of the first batch; the draws of a batch depend on its number, so
        that parts of the data give the same sums as the whole.

    Arrays are numpy's. Raises DataError when there is no batch, and for a score that is not a finite number.
    """
    axes, _ = removable(layout)
    tally, padding = Tally(), Padding(layout, model)
    watch: Watch | None = None
    number = first
    with evaluating(model), _without_gradients(model), torch.enable_grad():
        for raw in data:
            batch = with_decoder_inputs(model, to_device(raw, model))
            padding.see(batch)
            if watch is None:
                called = called_by(model, layout, partial(run, model, batch))
                watch = Watch(model, layout, axes, tally, padding, called, weights)
            with watch.over(batch):
                value = scored(score, run(model, batch), batch, seed, number)
                if value.requires_grad:
                    value.backward()
            watch.add_batch(examples_of(batch))
            number += 1
    if watch is None:
        raise DataError("the data is empty: no batch was seen; pass at least one")
    padding.report()
    return sums_of(tally)


def scored(score: Score, output: Any, batch: Any, seed: int, number: int) -> torch.Tensor:
    """The score of batch `number`, with draws of its own; DataError for one that is not a finite number."""
    value = score(output, batch, torch.Generator().manual_seed(seed * 1_000_003 + number))
    if not bool(value.isfinite()):
        raise DataError(f"the score of batch {number} is {float(value)}; look for NaN or huge weights")
    return value


def sums_of(tally: Tally) -> Stats:
    """What was tallied, as numpy arrays."""
    found = tally.stats()
    return Stats({q: {k: to_numpy(v) for k, v in entries.items()} for q, entries in found.sums.items()}, found.counts)


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient; flags and gradients are restored at the end."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad = False
            p.grad = None
        yield
    finally:
        for p, required, grad in before:
            p.requires_grad = required
            p.grad = grad


@dataclass(frozen=True, eq=False)
class _Reader:
    """A linear weight and the axes whose gates it sees. owners: axis -> the unit of each input (`Layout.owners`)."""

    name: str
    in_dim: int
    owners: Mapping[str, np.ndarray]


class Watch:
    """Hooks on the weights behind the axes, and what they have seen of the batch at hand.

    axes: as `removable` gives them, or those of one block. tally: gets the sums.
    called: paths of the modules that a forward pass calls, see `called_by`. A weight that no module of its own
        multiplies by, or that is no matrix, takes a gradient itself, and gates follow from the weight times its
        gradient.
    weights: see `collect_curvature`.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        axes: Mapping[str, Removable],
        tally: Tally,
        padding: Padding,
        called: Collection[str],
        weights: Collection[str] = (),
    ) -> None:
        self.model, self.layout, self.tally, self.padding = model, layout, tally, padding
        self.modules = linear_modules(model, layout)
        seen = {n for n, at in self.modules.items() if at and {*called} >= {*at} and len(layout.params[n]) == 2}
        hooked = [a for a in axes.values() if seen >= {*a.readers} and layout.axis(a.axis).kind != "expert"]
        self.by_weight = [a for a in axes.values() if a not in hooked]
        self.readers = {
            name: _Reader(
                name,
                layout.linears[name].in_dim,
                {a.axis: _owner(layout, name, a.axis) for a in hooked if name in a.readers},
            )
            for axis in hooked
            for name in axis.readers
        }
        more = seen & {*weights}
        for name in sorted(more - {*self.readers}):
            self.readers[name] = _Reader(name, layout.linears[name].in_dim, {})
        self.whole = more | {axis.weight for axis in hooked if axis.weight is not None}
        """The weights whose matrices are wanted, and not only gates."""
        named = dict(model.named_parameters(remove_duplicate=False))
        wanted = {reader for axis in self.by_weight for reader in axis.readers if reader in named}
        self.weights = {name: named[name] for name in sorted(wanted)}
        for weight in self.weights.values():
            weight.requires_grad_()
        self.size = 1
        self.gates: dict[str, torch.Tensor] = {}
        self.outer: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def over(self, batch: Any) -> Iterator[None]:
        """While the context lasts, forward and backward passes on the batch are watched."""
        self.size, self.gates, self.outer = size_of(batch), {}, {}
        handles = [
            module.register_forward_hook(self._hook(self.readers[name], path), with_kwargs=True)
            for name in self.readers
            for path, module in self.modules[name].items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, reader: _Reader, path: str) -> Callable[..., torch.Tensor | None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
            x = input_of(module, args, kwargs).detach()
            if not x.is_floating_point():  # an embedding that shares the weight reads indices
                return None
            mask = self.padding(path, tuple(x.shape[:-1]))
            weight = cast("torch.Tensor", module.weight).detach()
            weight = weight if reader.in_dim == 1 else weight.T
            first: torch.Tensor = output if output.requires_grad else output.detach().requires_grad_()
            first.register_hook(lambda g: self._add(reader, x, g, weight, mask))
            return None if first is output else first.clone()  # which the model may change in place

        return see

    @torch.no_grad()
    def _add(
        self, reader: _Reader, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """Add one call. x: (..., in), g: (..., out), weight: (out, in), mask: the real tokens."""
        groups = self.size if x.dim() > 1 and x.shape[0] == self.size else 1
        if mask is not None:
            kept = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
            g = g.masked_fill(~kept, 0)
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        energy = g.square().sum(1)
        rows = energy > 0
        group = torch.arange(len(x), device=x.device).div(len(x) // groups, rounding_mode="floor")[rows]
        x, g, energy = x[rows], g[rows], energy[rows]
        if reader.name in self.whole:
            total = float(energy.sum())
            self.tally.add("fisher_in", reader.name, (x * energy[:, None]).T @ x, total)
            self.tally.add("fisher_mean", reader.name, energy @ x, total)
            outer = g.T @ g
            self.outer[reader.name] = self.outer[reader.name] + outer if reader.name in self.outer else outer
        if not reader.owners:
            return
        gates = x.new_zeros(groups, x.shape[1]).index_add_(0, group, x * (g @ weight.float()))
        for axis, owner in reader.owners.items():
            units = gates.new_zeros(groups, self.layout.axis(axis).size + 1)
            units.index_add_(1, torch.from_numpy(owner).to(gates.device) + 1, gates)
            self._add_units(axis, units[:, 1:].double())

    def _add_units(self, axis: str, units: torch.Tensor) -> None:
        """Add gradients of gates (examples or 1, units) to those of the batch; unlike parts only as sums of all."""
        before = self.gates.get(axis)
        if before is not None and before.shape != units.shape:
            before, units = before.sum(0, keepdim=True), units.sum(0, keepdim=True)
        self.gates[axis] = units if before is None else before + units

    def add_batch(self, examples: int) -> None:
        """Add what was seen of the batch: squares of the gates, outer products of gradients, and its examples.

        A sum over examples squares to the sum of their squares in expectation, as the scores of examples are
        independent and have mean zero. It stands in where rows cannot be told apart by example.
        """
        products = {
            name: weight.grad.detach().float() * weight.detach().float()
            for name, weight in self.weights.items()
            if weight.grad is not None
        }
        for axis in self.by_weight:
            parts = [self.layout.reduce(name, products[name], axis.axis) for name in axis.readers if name in products]
            if parts:
                self._add_units(axis.axis, torch.from_numpy(np.sum(parts, 0))[None])
        for weight in self.weights.values():
            weight.grad = None
        for name, units in self.gates.items():
            self.tally.add("fisher_gate", name, to_numpy(units.square().sum(0)), examples)
        for name, outer in self.outer.items():
            self.tally.add("fisher_out", name, outer, examples)


def _owner(layout: Layout, param: str, axis: str) -> np.ndarray:
    """The unit of each input of a matrix, -1 where none owns it."""
    owner = layout.owners(param, axis)[layout.linears[param].in_dim]
    assert owner is not None
    return owner


def called_by(model: nn.Module, layout: Layout, forward: Callable[[], Any]) -> set[str]:
    """Paths of the modules, among those of linear weights, that a forward pass of the model or of a part calls."""
    called: set[str] = set()

    def noting(path: str) -> Callable[..., None]:
        return lambda *_: called.add(path)

    handles = [
        module.register_forward_hook(noting(path))
        for named in linear_modules(model, layout).values()
        for path, module in named.items()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return called
