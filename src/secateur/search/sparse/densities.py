"""Densities: what zeros in each linear weight are expected to cost, and which share of each weight stays.

A few densities of each weight are pruned by SparseGPT, and the growth of the divergence is taken from its curvature.
Between them the logarithm of the loss is linear in that of the density. The time that a kernel takes goes with the
number of weights that stay, so that one price for a weight lets every layer choose its density by itself (Lagrange
multipliers; Everett, 1963).
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from secateur.arrays import Array, to_numpy
from secateur.errors import PlanError
from secateur.host import Host
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.pruning import default_weights
from secateur.repair import alps, prepare, sparsegpt
from secateur.repair.by_curvature import growth, prune_by_curvature
from secateur.repair.gram import Gram
from secateur.repair.structured import centred
from secateur.stats import Stats

MEASURED = (0.5, 0.25, 0.12, 0.06, 0.03)
"""Densities at which each weight is pruned."""
OFFERED = np.geomspace(0.6, 0.03, 50)
"""Densities that are chosen from: denser weights run no faster than dense ones."""


Losses = MutableMapping[tuple[str, bytes, bytes], np.ndarray]
"""(weight, its rows, its columns) -> its losses at `OFFERED`."""


@dataclass(frozen=True)
class DensityLosses:
    """What zeros cost in the weights of a model of certain sizes.

    sizes: linear weight -> its number of entries.
    losses: linear weight -> expected divergence per example at each of `OFFERED`, (densities,).
    """

    sizes: Mapping[str, int]
    losses: Mapping[str, np.ndarray]

    def total(self, densities: Mapping[str, float]) -> float:
        """The expected divergence of densities that are among `OFFERED`."""
        return sum(float(self.losses[name][np.abs(OFFERED - d).argmin()]) for name, d in densities.items())


@dataclass(frozen=True, eq=False)
class _Layer:
    """One weight as far as units stay. weight: (out, in). inputs: A. outputs: G. mean: of the inputs, (in,), or None.

    place: which rows and columns of the full matrix these are. bias: the name of the bias that makes up for the mean.
    """

    weight: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    mean: np.ndarray | None
    place: tuple[np.ndarray, np.ndarray]
    bias: str | None
    is_transposed: bool

    def gram(self) -> Gram:
        """A for the methods of repair, whose loops are fast on tensors."""
        return prepare(torch.from_numpy(self.inputs.astype(np.float32)))

    def pruned(self, gram: Gram, density: float, method: Callable[..., Array]) -> np.ndarray:
        """The weight with zeros. gram: as `gram` makes it."""
        weight = torch.from_numpy(np.ascontiguousarray(self.weight, np.float32))
        return prune_by_curvature(weight, gram, self.outputs.diagonal(), density, method)


def sparse_weights(layout: Layout, stats: Stats) -> list[str]:
    """The linear weights whose densities can be chosen: those pruned by default, where their curvature is known."""
    return [name for name in default_weights(layout) if stats.has("fisher_in", name)]


def density_losses(host: Host, stats: Stats, plan: Plan, cache: Losses | None = None) -> DensityLosses:
    """What zeros cost in each weight, beside the units that a plan removes.

    host: the dense model. plan: of units. cache: keeps losses for plans that share sizes.
    """
    cache = {} if cache is None else cache
    sizes, losses = {}, {}
    for name in sparse_weights(host.layout, stats):
        layer = _layer(host, stats, plan, name)
        if layer is None:
            continue
        rows, columns = layer.place
        key = (name, rows.tobytes(), columns.tobytes())
        if key not in cache:
            cache[key] = _losses(layer)
        sizes[name], losses[name] = layer.weight.size, cache[key]
    return DensityLosses(sizes, losses)


def _losses(layer: _Layer) -> np.ndarray:
    """The expected divergence at `OFFERED`."""
    gram = layer.gram()
    pruned = [layer.pruned(gram, density, sparsegpt) for density in MEASURED]
    seen = [growth(new - layer.weight, layer.inputs, layer.outputs) for new in pruned]
    logs = np.log(np.maximum.accumulate(np.maximum(seen, 1e-30)))
    inner = np.interp(-np.log(OFFERED), -np.log(MEASURED), logs)
    slope = (logs[1] - logs[0]) / np.log(MEASURED[0] / MEASURED[1])
    return np.exp(np.where(MEASURED[0] < OFFERED, logs[0] - slope * np.log(OFFERED / MEASURED[0]), inner))


def choose_densities(losses: DensityLosses, kept: float) -> dict[str, float]:
    """The densities of least expected divergence with which at most `kept` single weights stay in all.

    Raises PlanError when so few cannot stay.
    """
    names = list(losses.sizes)
    sizes = np.array([losses.sizes[name] for name in names])
    table = np.array([losses.losses[name] for name in names])
    least = float(OFFERED[-1] * sizes.sum())
    if kept < least:
        raise PlanError(f"{max(kept, 0):,.0f} single weights cannot be all that stay: the least is {least:,.0f}")

    def at(price: float) -> np.ndarray:
        return (table + price * sizes[:, None] * OFFERED).argmin(1)

    low, high = 1e-30, 1e6
    while high / low > 1 + 1e-6:
        price = (low * high) ** 0.5
        low, high = (low, price) if (OFFERED[at(price)] * sizes).sum() <= kept else (price, high)
    return {name: float(OFFERED[i]) for name, i in zip(names, at(high), strict=True)}


def uniform_density(losses: DensityLosses, kept: float) -> dict[str, float]:
    """The same density everywhere, such that `kept` single weights stay."""
    return dict.fromkeys(losses.sizes, kept / sum(losses.sizes.values()))


def with_zeros(
    host: Host,
    stats: Stats,
    plan: Plan,
    densities: Mapping[str, float],
    method: Callable[..., Array] = alps,
) -> Plan:
    """A plan of units with zeros in what stays: masks and new weights in full shapes, zero where units go.

    Biases make up for the mean of what zeros take away. method: see `secateur.repair`.
    """
    masks, weights = dict(plan.masks), dict(plan.weights)
    for name, density in densities.items():
        layer = _layer(host, stats, plan, name)
        if layer is None or density >= 1:
            continue
        new = layer.pruned(layer.gram(), density, method)
        shape = host.layout.shape(name)
        full = np.zeros(shape[::-1] if layer.is_transposed else shape, np.float32)
        full[np.ix_(*layer.place)] = new
        weights[name] = np.ascontiguousarray(full.T if layer.is_transposed else full)
        masks[name] = weights[name] != 0
        if layer.bias is not None and layer.mean is not None:
            bias = np.array(_present(host, plan, layer.bias), np.float32)
            bias[layer.place[0]] += ((layer.weight - new) @ layer.mean).astype(np.float32)
            weights[layer.bias] = bias
    return Plan(plan.keep, masks, plan.sizes, {**plan.provenance, "pattern": "units and single weights"}, weights)


def _layer(host: Host, stats: Stats, plan: Plan, name: str) -> _Layer | None:
    """A weight as far as a plan keeps it, with the weights that make up for units; None where nothing of it stays."""
    layout = host.layout
    alive = layout.kept(name, plan.keep)
    if alive is None:
        return None
    matrix, shape = _present(host, plan, name), layout.shape(name)
    rows, columns = (np.flatnonzero(np.ones(n, bool) if a is None else a) for n, a in zip(shape, alive, strict=True))
    is_transposed = layout.linears[name].in_dim == 0
    if is_transposed:
        matrix, rows, columns = matrix.T, columns, rows
    inputs, mean = to_numpy(stats.mean("fisher_in", name)), None
    bias = f"{name.removesuffix('weight')}bias"
    if name.endswith("weight") and bias in layout.params:
        mean = to_numpy(stats.mean("fisher_mean", name))
        inputs = centred(inputs, mean)
    return _Layer(
        weight=matrix[np.ix_(rows, columns)],
        inputs=inputs[np.ix_(columns, columns)],
        outputs=to_numpy(stats.mean("fisher_out", name))[np.ix_(rows, rows)],
        mean=None if mean is None else mean[columns],
        place=(rows, columns),
        bias=None if mean is None else bias,
        is_transposed=is_transposed,
    )


def _present(host: Host, plan: Plan, name: str) -> np.ndarray:
    """A parameter with what makes up for units that go."""
    return plan.weights[name] if name in plan.weights else to_numpy(host.read(name))


def kept_weights(layout: Layout, names: Sequence[str], plan: Plan, densities: Mapping[str, float]) -> float:
    """How many single weights of the named ones stay at certain densities, 1 where there is none."""
    shapes = {name: layout.kept_shape(name, plan.keep) for name in names}
    return sum(densities.get(name, 1.0) * float(np.prod(shape)) for name, shape in shapes.items() if shape is not None)
