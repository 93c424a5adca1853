"""collect: run a Keras model over data and sum up what the criteria ask for, padding left out."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def collect(
    model: keras.Model,
    layout: Layout,
    variables: Mapping[str, Any],
    needs: Collection[str],
    data: Iterable[Any],
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
    wanted = set(needs)
    unknown = wanted - set(OF_WEIGHT) - set(OF_AXIS)
    if unknown:
        raise DataError(f"the Keras host cannot collect {sorted(unknown)[0]!r}")
    if axes is None:
        axes = [axis.name for axis in layout.axes.values() if not axis.frozen]
    tally, tokens = Tally(), Tokens()
    floating = {n: v for n, v in variables.items() if n in layout.params and "float" in str(v.dtype)}
    wanted_gradients = wanted & NEEDS_GRADIENT
    batches = 0
    with contextlib.ExitStack() as stack:
        grams = set(layout.readers(weights).values()) if "gram" in wanted else set()
        _watch(stack, model, layout, wanted, axes, grams, tally, tokens)
        for batch in data:
            batches += 1
            x, _, _ = unpack(batch)
            tokens.clear(token_mask(x) if token_mask else None)
            if wanted_gradients:
                found = gradients(model, floating, batch, loss)
                _add_gradients(layout, floating, found, wanted_gradients, axes, tally)
            else:
                run(model, x)
    if not batches:
        raise DataError("the data is empty: no batch was seen; pass at least one")
    return tally.stats()


def _add_gradients(
    layout: Layout,
    variables: Mapping[str, Any],
    found: BatchGradients,
    wanted: set[str],
    axes: Sequence[str],
    tally: Tally,
) -> None:
    products: dict[str, np.ndarray] = {}
    for name, grad in found.values.items():
        grad = grad.astype(np.float32)
        if "grad" in wanted:
            tally.add("grad", name, grad * found.items if found.mean else grad, found.items)
        if "grad_sq" in wanted:
            tally.add("grad_sq", name, grad**2, 1)
        if "unit_grad_sq" in wanted and name in layout.linears:
            products[name] = grad * keras.ops.convert_to_numpy(variables[name])
    tally.add_gates(layout, products, axes)


def input_owner(layout: Layout, param: str, axis: str) -> np.ndarray:
    """For each of a weight's flattened inputs, the unit of the axis that it belongs to, or -1."""
    linear, shape = layout.linears[param], layout.shape(param)
    owners = layout.owners(param, axis)
    dims = linear.contracted
    result = np.full([shape[d] for d in dims], -1, dtype=np.int64)
    for place, dim in enumerate(dims):
        owner = owners[dim]
        if owner is not None:
            view = [1] * len(dims)
            view[place] = -1
            result = np.where(owner.reshape(view) >= 0, owner.reshape(view), result)
    return result.reshape(-1)


def _watch(
    stack: contextlib.ExitStack,
    model: keras.Model,
    layout: Layout,
    wanted: set[str],
    axes: Sequence[str],
    grams: set[str],
    tally: Tally,
    tokens: Tokens,
) -> None:
    attention = {need for need in wanted if need.startswith("attn_")}
    inputs = wanted & {"act_sq", "unit_act", "gram"}
    if not attention and not inputs:
        return
    found = dict(layers(model))
    for path, layer in found.items():
        kernel = f"{path}.kernel"
        if isinstance(layer, ATTENTION) and base_of(layer) is not None and attention:
            axis = _head_axis(layout, path)
            if axis is not None:
                mixing = _output_grams(layer) if "attn_output" in attention else None
                use = _score_adder(tally, axis.name, attention, mixing)
                stack.enter_context(replaced(layer, "_compute_attention", attending(layer, path, tokens, use)))
        if kernel in layout.linears and inputs and base_of(layer) is not None:
            readers = [a for a in axes if layout.reads(kernel, a)] if "unit_act" in wanted else []
            owners = {axis: input_owner(layout, kernel, axis) for axis in readers}
            sums = wanted & {"act_sq"} | ({"gram"} if kernel in grams else set())
            adder = _input_adder(kernel, layout, owners, sums, tally)
            stack.enter_context(replaced(layer, "call", reading(layer, tokens, adder)))
        else:
            stack.enter_context(replaced(layer, "call", noting(tokens)))


def _head_axis(layout: Layout, path: str) -> Axis | None:
    for axis in layout.axes.values():
        if axis.kind == "head" and layout.carries(f"{path}.query.kernel", axis.name):
            return axis
    return None


def _input_adder(
    param: str, layout: Layout, owners: Mapping[str, np.ndarray], sums: set[str], tally: Tally
) -> Callable[[np.ndarray], None]:
    def add(rows: np.ndarray) -> None:
        if "act_sq" in sums:
            tally.add("act_sq", param, (rows.astype(np.float64) ** 2).sum(0), rows.shape[0])
        if "gram" in sums:
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
