"""One-shot repair of the weights of a model: grams -> sparsity of each weight -> new weights."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from secateur import criteria
from secateur.arrays import Array, namespace, to_numpy
from secateur.budget import Budget, Uniform
from secateur.errors import DataError, PlanError
from secateur.host import Host
from secateur.layout import Layout
from secateur.repair import prepare
from secateur.select import NM, Block, Element, restored, rows_of, select_weights
from secateur.stats import Stats

Repair = Callable[..., Array]


def repair_weights(
    host: Host,
    method: Repair,
    names: Sequence[str],
    pattern: Element | NM | Block,
    budget: Budget | None,
    stats: Stats,
    kinds: Mapping[str, str],
    *,
    start: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Masks and new weights of the named linear weights; weights that read the same tensor share a factorised gram.

    method: see `secateur.repair`.
    budget: one that is not uniform is divided by Wanda scores, ranked within `kinds` where it asks for kinds or layers.
    stats: holds the grams.
    kinds: weight -> its kind or layer.
    start: masks that the method begins with.

    Raises DataError for a weight whose gram was not collected, PlanError when the method takes no start.
    """
    readers = host.layout.readers(names)
    for name in names:
        if not stats.has("gram", readers[name]):
            raise DataError(
                f"no gram was collected for {name}: repair works on linear modules that the data reaches; choose "
                "others with weights="
            )
    if start is not None and "start" not in inspect.signature(method).parameters:
        raise PlanError(f"{_name(method)} chooses by itself what stays; leave out the criterion")
    shares = _sparsities(host, names, readers, pattern, budget, stats, kinds)
    masks, weights = {}, {}
    gram, gram_name = None, None
    for name in sorted(names, key=lambda n: names.index(readers[n])):
        weight = _matrix(host.layout, name, host.read(name))
        if readers[name] != gram_name:
            gram, gram_name = prepare(stats.mean("gram", readers[name]), like=weight), readers[name]
        options = {} if start is None else {"start": _like(weight, _matrix(host.layout, name, start[name]))}
        new = to_numpy(method(weight, gram, pattern, shares[name], **options))
        weights[name] = _stored(host.layout, name, new)
        masks[name] = weights[name] != 0
    return {name: masks[name] for name in names}, {name: weights[name] for name in names}


def layer_of(layout: Layout, param: str) -> str:
    """The repeated layer that holds a parameter (`layers.3`), or its own name."""
    for axis in layout.axes.values():
        if axis.kind == "layer":
            unit = layout.member_of(param, axis.name)
            if unit is not None:
                return f"{axis.name}.{unit}"
    return param


def _sparsities(
    host: Host,
    names: Sequence[str],
    readers: Mapping[str, str],
    pattern: Element | NM | Block,
    budget: Budget | None,
    stats: Stats,
    kinds: Mapping[str, str],
) -> dict[str, float | None]:
    """The sparsity of each weight; None for N:M. See `repair_weights` for the arguments."""
    if isinstance(pattern, NM):
        return dict.fromkeys(names)
    if isinstance(budget, Uniform):
        return dict.fromkeys(names, budget.sparsity)
    scores = {}
    for name in names:
        weight = _matrix(host.layout, name, host.read(name))
        act_sq = namespace(weight).linalg.diagonal(prepare(stats.mean("gram", readers[name]), like=weight).given)
        scores[name] = to_numpy(criteria.wanda(weight, act_sq[None, :]))
    masks = select_weights(scores, dict.fromkeys(names, 1), pattern, budget, kinds)
    return {name: 1 - float(mask.mean()) for name, mask in masks.items()}


def _matrix(layout: Layout, name: str, array: Array) -> Array:
    """A weight as (out, in): an attention kernel (hidden, head, v) of Keras becomes (head v, hidden)."""
    rows = rows_of(array, layout.linears[name].contracted)
    return rows.reshape(-1, rows.shape[-1])


def _stored(layout: Layout, name: str, matrix: np.ndarray) -> np.ndarray:
    """A matrix (out, in) in the shape that the weight is stored in."""
    shape, inputs = layout.shape(name), layout.linears[name].contracted
    outputs = [n for dim, n in enumerate(shape) if dim not in inputs]
    return restored(matrix.reshape(*outputs, -1), inputs, shape)


def _like(weight: Array, mask: np.ndarray) -> Array:
    """The mask in the array library of the weight."""
    return namespace(weight).asarray(np.ascontiguousarray(mask))


def _name(method: Repair) -> str:
    return str(getattr(method, "__name__", method))
