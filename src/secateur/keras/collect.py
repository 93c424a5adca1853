"""collect: run a Keras model over data and sum up what the criteria ask for, without padding."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from secateur.errors import DataError
from secateur.keras.batches import run, unpack
from secateur.keras.gradients import BatchGradients, gradients
from secateur.keras.naming import layers
from secateur.keras.rules import base_of
from secateur.keras.watch import Tokens, attending, noting, reading, replaced
from secateur.layout import Axis, Layout
from secateur.stats import NEEDS_GRADIENT, OF_AXIS, OF_WEIGHT, Stats, Tally

ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


@dataclass(frozen=True)
class _Sums:
    """What a run over data adds up.

    needs: the quantities.
    axes: the axes whose quantities are wanted, and grams: the weights whose grams are.
    tokens: which positions of the batch are real.
    """

    layout: Layout
    needs: set[str]
    axes: Sequence[str]
    grams: set[str]
    tally: Tally = field(default_factory=Tally)
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def of_attention(self) -> set[str]:
        """Quantities of attention scores."""
        return {need for need in self.needs if need.startswith("attn_")}

    @property
    def of_inputs(self) -> set[str]:
        """Quantities of the inputs of linear layers."""
        return self.needs & {"act_sq", "unit_act", "gram"}


def collect(
    model: keras.Model,
    layout: Layout,
    variables: Mapping[str, Any],
    needs: Collection[str],
    data: Iterable[Any],
    *,
    axes: Sequence[str] | None = None,
    loss: Any = None,
    token_mask: Callable[[Any], Any] | None = None,
    weights: Sequence[str] | None = None,
) -> Stats:
    """Sum the quantities `needs` over the batches, in inference mode.

    weights: the linear weights whose grams are wanted (default: all).
    token_mask: inputs -> bool (batch, positions), for models whose padding Keras masks do not carry.
    Raises DataError when there is no batch, or when a gradient is asked for and there is no loss.
    """
    unknown = set(needs) - set(OF_WEIGHT) - set(OF_AXIS)
    if unknown:
        raise DataError(f"the Keras host cannot collect {sorted(unknown)[0]!r}")
    if axes is None:
        axes = [axis.name for axis in layout.axes.values() if not axis.frozen]
    grams = set(layout.readers(weights).values()) if "gram" in needs else set()
    sums = _Sums(layout, set(needs), axes, grams)
    floating = {n: v for n, v in variables.items() if n in layout.params and "float" in str(v.dtype)}
    batches = 0
    with _watched(model, sums):
        for batch in data:
            batches += 1
            x, _, _ = unpack(batch)
            sums.tokens.clear(token_mask(x) if token_mask else None)
            if sums.needs & NEEDS_GRADIENT:
                _add_gradients(sums, floating, gradients(model, floating, batch, loss))
            else:
                run(model, x)
    if not batches:
        raise DataError("the data is empty: no batch was seen; pass at least one")
    return sums.tally.stats()


def _add_gradients(sums: _Sums, variables: Mapping[str, Any], batch: BatchGradients) -> None:
    products: dict[str, np.ndarray] = {}
    for name, grad in batch.values.items():
        grad = grad.astype(np.float32)
        if "grad" in sums.needs:
            sums.tally.add("grad", name, grad * batch.items if batch.mean else grad, batch.items)
        if "grad_sq" in sums.needs:
            sums.tally.add("grad_sq", name, grad**2, 1)
        if "unit_grad_sq" in sums.needs and name in sums.layout.linears:
            products[name] = grad * keras.ops.convert_to_numpy(variables[name])
    sums.tally.add_gates(sums.layout, products, sums.axes)


def input_owner(layout: Layout, param: str, axis: str) -> np.ndarray:
    """For each of a weight's flattened inputs, the unit of the axis that it belongs to, or -1."""
    linear, shape = layout.linears[param], layout.shape(param)
    owners = layout.owners(param, axis)
    dims = linear.contracted
    result = np.full([shape[d] for d in dims], -1, dtype=np.int64)
    for position, dim in enumerate(dims):
        owner = owners[dim]
        if owner is not None:
            view = [1] * len(dims)
            view[position] = -1
            result = np.where(owner.reshape(view) >= 0, owner.reshape(view), result)
    return result.reshape(-1)


@contextlib.contextmanager
def _watched(model: keras.Model, sums: _Sums) -> Iterator[None]:
    """While the context lasts, layers of the model add to the sums when they run."""
    with contextlib.ExitStack() as stack:
        if sums.of_attention or sums.of_inputs:
            for path, layer in list(layers(model)):
                for method, make in _watchers(path, layer, sums):
                    stack.enter_context(replaced(layer, method, make))
        yield


def _watchers(path: str, layer: Any, sums: _Sums) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(method, its watched form) of a layer."""
    layout, kernel, is_known = sums.layout, f"{path}.kernel", base_of(layer) is not None
    axis = _head_axis(layout, path) if is_known and isinstance(layer, ATTENTION) and sums.of_attention else None
    if axis is not None:
        mixing = _output_grams(layer) if "attn_output" in sums.needs else None
        use = _score_adder(sums.tally, axis.name, sums.of_attention, mixing)
        yield "_compute_attention", attending(layer, path, sums.tokens, use)
    if is_known and sums.of_inputs and kernel in layout.linears:
        yield "call", reading(layer, sums.tokens, _input_adder(kernel, sums))
    else:
        yield "call", noting(sums.tokens)


def _head_axis(layout: Layout, path: str) -> Axis | None:
    for axis in layout.axes.values():
        if axis.kind == "head" and layout.carries(f"{path}.query.kernel", axis.name):
            return axis
    return None


def _input_adder(param: str, sums: _Sums) -> Callable[[np.ndarray], None]:
    layout, tally = sums.layout, sums.tally
    axes = [axis for axis in sums.axes if layout.reads(param, axis)] if "unit_act" in sums.needs else []
    owners = {axis: input_owner(layout, param, axis) for axis in axes}

    def add(rows: np.ndarray) -> None:
        if "act_sq" in sums.needs:
            tally.add("act_sq", param, (rows.astype(np.float64) ** 2).sum(0), rows.shape[0])
        if param in sums.grams:
            tally.add("gram", param, rows.T @ rows, rows.shape[0])
        magnitude = np.abs(rows).sum(0, dtype=np.float64)
        for axis, owner in owners.items():
            size = layout.axis(axis).size
            tally.add("unit_act", axis, np.bincount(owner + 1, weights=magnitude, minlength=size + 1)[1:], len(rows))

    return add


def _output_grams(layer: Any) -> np.ndarray:
    """W_O W_O^T of each head, shape (heads, v, v), so that |y W_O| = sqrt(y G y^T) for a head's output y."""
    kernel = keras.ops.convert_to_numpy(layer._output_dense.kernel)
    kernel = kernel.reshape(*kernel.shape[:2], -1)
    return kernel @ np.swapaxes(kernel, -1, -2)


def _score_adder(tally: Tally, axis: str, needs: set[str], grams: np.ndarray | None) -> Any:
    def add(weights: np.ndarray, values: np.ndarray, mask: np.ndarray | None) -> None:
        batch, _, queries, _ = weights.shape
        alive = np.ones((batch, queries)) if mask is None else mask.astype(np.float64)
        count = float(alive.sum())

        def put(quantity: str, per_query: np.ndarray) -> None:  # (batch, heads, queries) -> (heads,)
            if quantity in needs:
                tally.add(quantity, axis, np.einsum("bhq,bq->h", per_query.astype(np.float64), alive), count)

        put("attn_sum", weights.sum(-1))
        put("attn_mass", (weights @ np.linalg.norm(values, axis=-1, keepdims=True))[..., 0])
        put("attn_confidence", weights.max(-1))
        put("attn_entropy", -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(-1))
        if grams is not None:
            y = weights @ values
            put("attn_output", np.sqrt(np.clip(np.einsum("bhqd,hde,bhqe->bhq", y, grams, y), 0.0, None)))

    return add
