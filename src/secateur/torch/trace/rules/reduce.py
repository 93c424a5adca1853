"""Rules for sums, means, norms, softmax and all else that makes the units of an axis depend on each other."""

from dataclasses import replace

from secateur.torch.trace.atoms import Dim, expand, fresh, mark, size
from secateur.torch.trace.rules.product import add_bias
from secateur.torch.trace.values import OpCall, Rule, Value, broadcast, remap

COUNTED = ("cumsum", "cumprod", "cummax", "logcumsumexp")
"""Units are added up in their order, and the result has all of them."""
ONE_AXIS = ("topk", "sort", "argsort")
"""Work along one dimension, by default the last."""
POSITIONS = ("argmax", "argmin", "argsort")
"""The result holds positions of the dimension; of an operation with two results, the second does."""


def _without(call: OpCall, x: Value, axes: list[int]) -> Value:
    keeps = len(call.shape) == x.rank
    dims = [() if i in axes else remap(dim) for i, dim in enumerate(x.dims) if keeps or i not in axes]
    return call.new(dims, tag=x.tag)


def total(call: OpCall) -> Value:
    """A sum, or a norm (a sum of powers): allowed over an axis that is zero at masked units."""
    x = call.value("self")
    axes = call.axes()
    for i in axes:
        for factor in expand(x.dims[i]):
            if not factor.zero:
                mark((factor,), "summed over where a masked unit need not vanish")
    over = tuple(f for i in axes for f in expand(x.dims[i]))
    return replace(_without(call, x, axes), tag=x.tag or "sum", over=x.over or over)


def average(call: OpCall) -> Value | list[Value]:
    """mean, var, std: divided by the number of units."""
    x = call.value("self")
    axes = call.axes()
    for i in axes:
        mark(x.dims[i], "averaged over", "normed")
    result = _without(call, x, axes)
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


def average_pool(call: OpCall) -> Value:
    """Pooling freezes the positions it pools and keeps channels."""
    x = call.value("self")
    dims = list(x.dims)
    pooled = 1 if call.name.endswith("1d") else 2
    for i in range(x.rank):
        if size(dims[i]) != call.shape[i] or i >= x.rank - pooled:
            mark(dims[i], "positions are pooled")
            dims[i] = fresh(call.shape[i], "pooled positions")
    return call.new(dims)


def pick(call: OpCall) -> Value | list[Value]:
    """max, min, any, argmax, topk, sort, cumsum, ...: units are compared with each other or counted in order."""
    x = call.value("self")
    axes = [call.axis(default=-1)] if call.name in ONE_AXIS else call.axes()
    for i in axes:
        mark(x.dims[i], f"its units are compared or counted ({call.name})", "routed")
    results = []
    for index in range(len(call.shapes)):
        holds_positions = index > 0 or call.name in POSITIONS
        domain = x.dims[axes[0]] if holds_positions and len(axes) == 1 else None
        results.append(call.new(_picked(call, x, axes, call.shape_of(index)), domain=domain))
    return results if len(results) > 1 else results[0]


def _picked(call: OpCall, x: Value, axes: list[int], shape: tuple[int, ...]) -> list[Dim]:
    if len(shape) != x.rank:
        return [remap(dim, zero=False) for i, dim in enumerate(x.dims) if i not in axes]
    kept = range(x.rank) if call.name in COUNTED else [i for i in range(x.rank) if i not in axes]
    return [remap(dim, zero=False) if i in kept else fresh(shape[i], "ranked units") for i, dim in enumerate(x.dims)]


def softmax(call: OpCall) -> Value:
    """Units along the dimension share one sum."""
    x = call.value("self")
    axis = call.axis(default=-1)
    mark(x.dims[axis], "normalised by a softmax", "routed")
    return call.new([remap(d, zero=False) for d in x.dims], tag="prob")


def layer_norm(call: OpCall) -> Value | list[Value]:
    """layer_norm: the last dimensions are normalised together, then scaled and shifted."""
    x = call.value("input")
    dims = list(x.dims)
    for i in range(x.rank - len(call.items("normalized_shape")), x.rank):
        mark(dims[i], f"normalised by {call.name}", "normed")
        if call.name != "rms_norm":
            dims[i] = remap(dims[i], zero=False)
    out = Value(tuple(dims), data=True)
    weight, bias = call.optional("weight"), call.optional("bias")
    if weight is not None:
        out = _scaled(out, weight)
    if bias is not None:
        out = Value(tuple(broadcast(_shape(out), [out, bias], all)), data=True)
    return _with_statistics(call, out)


def _shape(value: Value) -> list[int]:
    return [size(dim) for dim in value.dims]


def _scaled(x: Value, weight: Value) -> Value:
    return Value(tuple(broadcast(_shape(x), [x, weight], any)), data=True)


def _with_statistics(call: OpCall, value: Value) -> Value | list[Value]:
    """The result, and for operations that also return them, the means and deviations."""
    if len(call.shapes) == 1:
        return value
    frozen = [call.new(call.frozen_dims("statistics of a norm", i)) for i in range(1, len(call.shapes))]
    return [value, *frozen]


def batch_norm(call: OpCall) -> Value | list[Value]:
    """batch_norm with stored statistics: each channel by itself."""
    x = call.value("input")
    if call.get("training", False):
        mark(x.dims[1], "normalised over the batch")
    out = Value(tuple(remap(d, zero=False) for d in x.dims), data=True)
    for name in ("running_mean", "running_var"):
        out = add_bias(out, call.optional(name), 1)
    return _with_statistics(call, _scaled_channels(call, out))


def _scaled_channels(call: OpCall, x: Value) -> Value:
    """x * weight + bias, with a weight and a bias for each channel (dimension 1)."""
    weight = call.optional("weight")
    if weight is not None:
        x = _scaled(x, replace(weight, dims=(weight.dims[0], *[()] * (x.rank - 2))))
    return add_bias(x, call.optional("bias"), 1)


def group_norm(call: OpCall) -> Value | list[Value]:
    """group_norm: the channels of a group are normalised together."""
    x = call.value("input")
    mark(x.dims[1], f"normalised by {call.name}", "normed")
    for dim in x.dims[2:]:
        mark(dim, "normalised over positions")
    out = Value(tuple(remap(d, zero=False) for d in x.dims), data=True)
    return _with_statistics(call, _scaled_channels(call, out))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("sum", "nansum", "linalg_vector_norm", "norm", "frobenius_norm"), total),
    **dict.fromkeys(("mean", "var", "std", "var_mean", "std_mean", "nanmean"), average),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"), average_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"), average_pool),
    **dict.fromkeys(("max", "min", "amax", "amin", "any", "all", "argmax", "argmin", "prod", "logsumexp"), pick),
    **dict.fromkeys(("topk", "sort", "argsort", "cumsum", "cumprod", "median", "cummax", "logcumsumexp"), pick),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"), batch_norm),
    **dict.fromkeys(("group_norm", "native_group_norm", "instance_norm"), group_norm),
}
