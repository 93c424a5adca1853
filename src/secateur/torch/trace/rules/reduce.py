"""Rules for sums, means, norms, softmax and whatever else makes the units of an axis depend on one another."""

from dataclasses import replace

from secateur.torch.trace.atoms import Dim, expand, fresh, mark
from secateur.torch.trace.rules.product import _biased
from secateur.torch.trace.values import OpCall, Rule, Value, broadcast, remap


def _without(call: OpCall, x: Value, axes: list[int], zero: bool | None) -> Value:
    keeps = len(call.shape) == x.rank
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        if i not in axes:
            dims.append(remap(dim, zero=zero))
        elif keeps:
            dims.append(())
    return call.new(dims, tag=x.tag)


def total(call: OpCall) -> Value:
    """A sum: allowed over an axis that is zero at masked units."""
    x = call.value("self")
    axes = call.axes()
    for i in axes:
        for factor in expand(x.dims[i]):
            if not factor.zero:
                mark((factor,), "summed over where a masked unit need not vanish")
    over = tuple(f for i in axes for f in expand(x.dims[i]))
    return replace(_without(call, x, axes, None), tag=x.tag or "sum", over=x.over or over)


def norm(call: OpCall) -> Value:
    """A vector norm: a sum of powers, so zeros do not count."""
    return total(call)


def average(call: OpCall) -> Value | list[Value]:
    """mean, var, std: divided by the number of units."""
    x = call.value("self")
    axes = call.axes()
    for i in axes:
        mark(x.dims[i], "averaged over", "normed")
    result = _without(call, x, axes, None)
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result


def average_pool(call: OpCall) -> Value:
    """Adaptive pooling freezes the positions it pools and keeps channels."""
    x = call.value("self")
    dims = list(x.dims)
    for i in range(len(dims)):
        if _extent(dims[i]) != call.shape[i] or i >= len(dims) - (1 if call.name.endswith("1d") else 2):
            mark(dims[i], "positions are pooled")
            dims[i] = fresh(call.shape[i], "pooled positions")
    return call.new(dims)


def _extent(dim: Dim) -> int:
    total = 1
    for f in expand(dim):
        total *= f.atom.size
    return total


def pick(call: OpCall) -> Value | list[Value]:
    """max, min, any, argmax, topk, sort, cumsum, ...: units are compared with one another or counted in order."""
    x = call.value("self")
    axes = call.axes() if call.name not in ("topk", "sort", "argsort", "msort") else [call.axis(default=-1)]
    for i in axes:
        mark(x.dims[i], f"its units are compared or counted ({call.name})", "routed")
    results = []
    for index, shape in enumerate(call.shapes):
        assert shape is not None
        dims: list[Dim] = []
        if len(shape) == x.rank:
            for i, dim in enumerate(x.dims):
                same = i not in axes
                ordered = call.name in ("cumsum", "cumprod", "cummax", "logcumsumexp")
                keep = same or ordered
                dims.append(remap(dim, zero=False) if keep else fresh(shape[i], "ranked units"))
        else:
            dims = [remap(d, zero=False) for i, d in enumerate(x.dims) if i not in axes]
        named = index > 0 or call.name in ("argmax", "argmin", "argsort")
        results.append(call.new(dims, domain=x.dims[axes[0]] if named and len(axes) == 1 else None))
    return results if len(results) > 1 else results[0]


def softmax(call: OpCall) -> Value:
    """Units along the dimension share one sum."""
    x = call.value("self")
    axis = call.axis(default=-1)
    mark(x.dims[axis], "normalised by a softmax", "routed")
    return call.new([remap(d, zero=False) for d in x.dims], tag="prob")


def layer_norm(call: OpCall) -> Value | list[Value]:
    """layer_norm: the last dimensions are normalised together, then scaled and shifted."""
    x = call.value("input")
    count = len(call.args["normalized_shape"])
    dims = list(x.dims)
    for i in range(x.rank - count, x.rank):
        mark(dims[i], f"normalised by {call.name}", "normed")
        if call.name != "rms_norm":
            dims[i] = remap(dims[i], zero=False)
    out = Value(tuple(dims), data=True)
    out = _scaled(out, call.args.get("weight"))
    return _several(call, _biased_last(call, out))


def _several(call: OpCall, value: Value) -> Value | list[Value]:
    if len(call.shapes) == 1:
        return value
    frozen = [call.new(call.frozen_dims("statistics of a norm", i)) for i in range(1, len(call.shapes))]
    return [value, *frozen]


def _scaled(x: Value, weight: Value | None) -> Value:
    if weight is None:
        return x
    shape = [_extent(d) for d in x.dims]
    fake = OpCall("mul", {"x": x, "w": weight}, [tuple(shape)], None)  # type: ignore[arg-type]
    return Value(tuple(broadcast(fake, [x, weight], any)), data=True)


def _biased_last(call: OpCall, out: Value) -> Value:
    bias = call.args.get("bias")
    if bias is None:
        return out
    shape = [_extent(d) for d in out.dims]
    fake = OpCall("add", {"x": out, "b": bias}, [tuple(shape)], None)  # type: ignore[arg-type]
    return Value(tuple(broadcast(fake, [out, bias], all)), data=True)


def batch_norm(call: OpCall) -> Value | list[Value]:
    """batch_norm with stored statistics: each channel by itself."""
    x = call.value("input")
    if call.get("training", False):
        mark(x.dims[1], "normalised over the batch")
    out = Value(tuple(remap(d, zero=False) for d in x.dims), data=True)
    for name in ("running_mean", "running_var"):
        if isinstance(call.args.get(name), Value):
            out = _biased(call, out, call.args[name], 1)
    out = _scale_channel(out, call.args.get("weight"))
    return _several(call, _biased(call, out, call.args.get("bias"), 1))


def _scale_channel(x: Value, weight: Value | None) -> Value:
    if weight is None:
        return x
    shape = [_extent(d) for d in x.dims]
    shaped = Value((weight.dims[0], *[()] * (x.rank - 2)), weight=weight.weight)
    fake = OpCall("mul", {"x": x, "w": shaped}, [tuple(shape)], None)  # type: ignore[arg-type]
    return Value(tuple(broadcast(fake, [x, shaped], any)), data=True)


def group_norm(call: OpCall) -> Value | list[Value]:
    """group_norm: channels of a group are normalised together."""
    x = call.value("input")
    mark(x.dims[1], f"normalised by {call.name}", "normed")
    for dim in x.dims[2:]:
        mark(dim, "normalised over positions")
    out = Value(tuple(remap(d, zero=False) for d in x.dims), data=True)
    out = _scale_channel(out, call.args.get("weight"))
    return _several(call, _biased(call, out, call.args.get("bias"), 1))


RULES: dict[str, Rule] = {
    "sum": total,
    "nansum": total,
    **dict.fromkeys(("linalg_vector_norm", "norm", "frobenius_norm"), norm),
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
