"""Rules for element-wise operations: operands broadcast, and zeros survive where f(0) = 0."""

from collections.abc import Callable

from secateur.torch.trace.atoms import expand, give_role, mark, narrow, unify
from secateur.torch.trace.values import OpCall, Rule, Value, broadcast, remap, words

KEEPS_ZERO = words(
    "relu gelu silu tanh neg abs sqrt square sin sinh asinh atan tan asin erf expm1 log1p sign sgn floor ceil round "
    "trunc mish hardswish relu6 leaky_relu elu celu selu softshrink hardshrink tanhshrink softsign nan_to_num frac "
    "logical_and __and__ bitwise_and prelu rrelu"
)
MAKES_NONZERO = words(
    "exp exp2 cos cosh acos sigmoid logsigmoid log_sigmoid rsqrt reciprocal log log2 log10 softplus hardsigmoid "
    "eq ne lt le gt ge "
    "logical_not bitwise_not isnan isinf isfinite logit erfc digamma lgamma atan2 logical_or logical_xor __or__ "
    "bitwise_or bitwise_xor __xor__ __lshift__ __rshift__ bitwise_left_shift bitwise_right_shift isclose "
    "isneginf isposinf fmod threshold"
)
ACTIVATIONS = words(
    "relu gelu silu tanh erf mish hardswish relu6 leaky_relu elu celu selu sigmoid softplus hardsigmoid square"
)
CASTS = words(
    "contiguous dropout clone alias detach to _to_copy lift_fresh_copy lift_fresh type_as float half bfloat16 "
    "native_dropout feature_dropout alpha_dropout positive conj resolve_conj resolve_neg "
    "_conj_physical cpu cuda int long bool double"
)


Zero = Callable[[list[bool]], bool]


def _tag(call: OpCall) -> str:
    tags = [t.tag for t in call.tensors()]
    return next((t for t in ("prob", "score", "sum") if t in tags), "")


def _elementwise(call: OpCall, zero: Zero, values: list[Value] | None = None) -> Value:
    values = call.tensors() if values is None else values
    over = next((v.over for v in values if v.over is not None), None)
    return call.new(broadcast(call, values, zero), tag=_tag(call), over=over)


def cast(call: OpCall) -> Value | list[Value]:
    """Operations that change neither positions nor, at a masked unit, the value."""
    x = next(iter(call.tensors()))
    kept = call.new(x.dims, key=x.key, tag=x.tag, weight=x.weight, order=x.order, looked_up=x.looked_up, over=x.over)
    if len(call.shapes) > 1:
        return [kept, call.new(x.dims)]
    return kept


def keeps_zero(call: OpCall) -> Value:
    """f(0) = 0, and any zero operand gives zero (`and`)."""
    return _activated(call, _elementwise(call, any))


def makes_nonzero(call: OpCall) -> Value:
    """f(0) != 0, or not known."""
    return _activated(call, _elementwise(call, lambda flags: False))


def _activated(call: OpCall, result: Value) -> Value:
    if call.name in ACTIVATIONS:
        for dim in result.dims:
            give_role(dim, "activated")
    return result


def _scalar(call: OpCall, name: str) -> float | None:
    value = call.args.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def add(call: OpCall) -> Value:
    """Sums: zero where every operand is; a residual sum of two activations is remembered."""
    other = _scalar(call, "other")
    values = call.tensors()
    if other is not None and other != 0:
        return _elementwise(call, lambda flags: False)
    result = _elementwise(call, all)
    if len(values) == 2 and all(v.data and not v.weight for v in values):
        _residual(call, values[0], values[1], result)
    return result


def _residual(call: OpCall, x: Value, y: Value, result: Value) -> None:
    if x.rank != y.rank or x.rank < 2 or "float" not in (x.dtype, y.dtype):
        return
    for old, new in ((x, y), (y, x)):
        if old.key >= 0 and new.behind >> old.key & 1:
            # Of an image that keeps its channels in front, the channels are the stream.
            call.record.residual += [d for d in result.dims if expand(d)][-1:] + list(result.dims[1:2])
            return


def multiply(call: OpCall) -> Value:
    """Products: zero where any operand is."""
    if _scalar(call, "other") == 0:
        return _elementwise(call, lambda flags: True)
    note_scale(call, call.tensors())
    return _elementwise(call, any)


def divide(call: OpCall) -> Value:
    """Quotients: zero where the numerator is."""
    if not isinstance(call.args.get("self"), Value):
        return makes_nonzero(call)
    note_scale(call, call.tensors())
    return _elementwise(call, lambda flags: flags[0])


def note_scale(call: OpCall, values: list[Value], name: str = "other") -> None:
    """Mark the axes beside a number that no module stores: it may have been computed from their size."""
    number = _scalar(call, name)
    if number is not None and (abs(number) == 1 or number in call.constants or 1 / (number or 1) in call.constants):
        return
    computed = number is not None or any(v.rank == 0 and not v.data and v.weight is None for v in values)
    for value in values if computed else []:
        for dim in (*value.dims, value.over or ()):
            mark(dim, "a scale beside it is computed and may follow its size", "scaled")
        if value.tag == "sum" and value.over is not None:
            mark(value.over, "summed, then scaled by a number that may follow its size")


def extreme(call: OpCall) -> Value:
    """Element-wise maximum and minimum: zero where both are."""
    return _elementwise(call, all)


def power(call: OpCall) -> Value:
    """x ** p keeps zeros for p > 0."""
    exponent = _scalar(call, "exponent")
    if exponent is not None and exponent > 0:
        return _elementwise(call, all)
    return makes_nonzero(call)


def clamp(call: OpCall) -> Value:
    """Zeros survive when zero lies inside the bounds."""
    bounds = [call.args.get(n) for n in ("min", "min_val", "max", "max_val")]
    if any(isinstance(b, Value) for b in bounds):
        return makes_nonzero(call)
    low = next((b for b in (call.args.get("min"), call.args.get("min_val")) if b is not None), -1)
    high = next((b for b in (call.args.get("max"), call.args.get("max_val")) if b is not None), 1)
    inside = low <= 0 <= high
    return _elementwise(call, (lambda flags: flags[0]) if inside else (lambda flags: False))


def where(call: OpCall) -> Value:
    """Choice between two tensors: zero where both are."""
    order = [call.args.get(n) for n in ("condition", "self", "other")]
    values = [v for v in order if isinstance(v, Value)]
    scalars = [v for v in order[1:] if isinstance(v, (int, float))]
    if any(s != 0 for s in scalars):
        return _elementwise(call, lambda flags: False, values)
    return _elementwise(call, lambda flags: all(flags[1:]), values)


def masked_fill(call: OpCall) -> Value:
    """Zeros survive when the value filled in is zero."""
    fill = call.args.get("value")
    keeps = isinstance(fill, (int, float)) and fill == 0
    values = [call.value("self"), call.value("mask")]
    return _elementwise(call, (lambda flags: flags[0]) if keeps else (lambda flags: False), values)


def glu(call: OpCall) -> Value:
    """a * sigmoid(b) over the two halves of a dimension."""
    x = call.value("self")
    axis = call.axis(default=-1)
    half = call.shape[axis]
    first, second = narrow(x.dims[axis], 0, half), narrow(x.dims[axis], half, half)
    unify(first, second)
    dims = [remap(d, zero=None, const=False) for d in x.dims]
    dims[axis] = first
    give_role(first, "activated")
    return call.new(dims)


def fill(call: OpCall) -> Value:
    """A constant of the shape of the argument."""
    zero = _scalar(call, "value") == 0
    return call.new([remap(d, zero=zero, const=True) for d in call.value("self").dims], data=False)


def polynomial(call: OpCall) -> Value:
    """addcmul, addcdiv, lerp: zero only where all operands are."""
    return _elementwise(call, all)


RULES: dict[str, Rule] = {
    **dict.fromkeys(CASTS, cast),
    **dict.fromkeys(KEEPS_ZERO, keeps_zero),
    **dict.fromkeys(MAKES_NONZERO, makes_nonzero),
    **dict.fromkeys(("add", "sub", "rsub", "subtract"), add),
    **dict.fromkeys(("mul", "multiply"), multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "remainder"), divide),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), extreme),
    **dict.fromkeys(("addcmul", "addcdiv", "lerp"), polynomial),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"), clamp),
    "pow": power,
    "where": where,
    "masked_fill": masked_fill,
    "glu": glu,
    "fill": fill,
    "__pow__": power,
}
