"""Rules for element-wise operations: operands broadcast, and zeros survive where f(0) = 0."""

from dataclasses import replace

from secateur.torch.trace.atoms import expand, give_role, mark, narrow, unify
from secateur.torch.trace.values import (
    NotCovered,
    OpCall,
    Rule,
    Value,
    ZeroRule,
    as_first,
    broadcast,
    never,
    remap,
    words,
)

KEEPS_ZERO = words(
    "relu gelu silu tanh neg abs sqrt square sin sinh asinh atan tan asin erf expm1 log1p sign sgn floor ceil round "
    "trunc mish hardswish relu6 leaky_relu elu celu selu softshrink hardshrink nan_to_num frac "
    "logical_and __and__ bitwise_and rrelu"
)
MAKES_NONZERO = words(
    "exp exp2 cos cosh acos sigmoid log_sigmoid rsqrt reciprocal log log2 log10 softplus hardsigmoid "
    "eq ne lt le gt ge "
    "logical_not bitwise_not isnan isinf isfinite logit erfc digamma lgamma atan2 logical_or logical_xor __or__ "
    "bitwise_or bitwise_xor __xor__ __lshift__ __rshift__ bitwise_left_shift bitwise_right_shift isclose "
    "isneginf isposinf fmod threshold"
)
ACTIVATIONS = words(
    "relu gelu silu tanh erf mish hardswish relu6 leaky_relu elu celu selu sigmoid softplus hardsigmoid square"
)
CASTS = words(
    "contiguous dropout clone alias detach to _to_copy lift_fresh_copy lift_fresh type_as "
    "native_dropout feature_dropout alpha_dropout positive conj resolve_conj resolve_neg "
    "_conj_physical cpu cuda"
)


def _tag(call: OpCall) -> str:
    tags = [t.tag for t in call.tensors()]
    return next((t for t in ("prob", "score", "sum") if t in tags), "")


def _elementwise(call: OpCall, zero: ZeroRule, values: list[Value] | None = None) -> Value:
    values = call.tensors() if values is None else values
    over = next((v.over for v in values if v.over is not None), None)
    return call.new(broadcast(call.shape, values, zero), tag=_tag(call), over=over)


def cast(call: OpCall) -> Value | list[Value]:
    """Operations that keep the positions, and the value at a masked unit."""
    tensors = call.tensors()
    if not tensors:
        raise NotCovered("no argument is a tensor")
    x = tensors[0]
    kept = call.new(x.dims, key=x.key, tag=x.tag, weight=x.weight, order=x.order, looked_up=x.looked_up, over=x.over)
    if len(call.shapes) > 1:
        return [kept, call.new(x.dims)]
    return kept


def keeps_zero(call: OpCall) -> Value:
    """f(0) = 0, and any zero operand gives zero (`and`)."""
    return _activated(call, _elementwise(call, any))


def makes_nonzero(call: OpCall) -> Value:
    """f(0) != 0, or not known."""
    return _activated(call, _elementwise(call, never))


def _activated(call: OpCall, result: Value) -> Value:
    if call.name in ACTIVATIONS:
        for dim in result.dims:
            give_role(dim, "activated")
    return result


def add(call: OpCall) -> Value:
    """Sums: zero where every operand is; a residual sum of two activations is remembered."""
    other = call.number("other")
    values = call.tensors()
    if other is not None and other != 0:
        return _elementwise(call, never)
    result = _elementwise(call, all)
    if len(values) == 2 and all(v.data and not v.weight for v in values):
        _residual(call, values[0], values[1], result)
    return result


def _residual(call: OpCall, x: Value, y: Value, result: Value) -> None:
    if x.rank != y.rank or x.rank < 2 or "float" not in (x.dtype, y.dtype):
        return
    for stream, branch in ((x, y), (y, x)):
        if stream.key >= 0 and branch.behind >> stream.key & 1:
            # An image that keeps its channels in front: the channels are the stream.
            call.record.residual += [d for d in result.dims if expand(d)][-1:] + list(result.dims[1:2])
            return


def multiply(call: OpCall) -> Value:
    """Products: zero where any operand is."""
    if call.number("other") == 0:
        return _elementwise(call, lambda zeros: True)
    note_scale(call, call.tensors())
    return _elementwise(call, any)


def divide(call: OpCall) -> Value:
    """Quotients: zero where the numerator is."""
    if not isinstance(call.args.get("self"), Value):
        return makes_nonzero(call)
    note_scale(call, call.tensors())
    return _elementwise(call, as_first)


def note_scale(call: OpCall, values: list[Value], name: str = "other") -> None:
    """Mark the axes beside a number that no module stores: it may have been computed from their size."""
    if not _is_computed(call, values, name):
        return
    for value in values:
        for dim in (*value.dims, value.over or ()):
            mark(dim, "a scale beside it is computed and may follow its size", "scaled")
        if value.tag == "sum" and value.over is not None:
            mark(value.over, "summed, then scaled by a number that may follow its size")


def _is_computed(call: OpCall, values: list[Value], name: str) -> bool:
    """Whether the number `name`, or a scalar tensor among the values, is neither 1, stored, nor 1 / stored."""
    number = call.number(name)
    if number is None:
        return any(v.rank == 0 and not v.data and v.weight is None for v in values)
    return abs(number) != 1 and number not in call.constants and 1 / (number or 1) not in call.constants


def extreme(call: OpCall) -> Value:
    """Element-wise maximum and minimum: zero where both are."""
    return _elementwise(call, all)


def prelu(call: OpCall) -> Value:
    """A slope for each channel: the weight lies along dimension 1 whatever follows; zero where the input is."""
    x, weight = call.value("self"), call.value("weight")
    if weight.rank == 1 and x.rank > 1:
        weight = replace(weight, dims=(*weight.dims, *((),) * (x.rank - 2)))
    return _elementwise(call, as_first, [x, weight])


def power(call: OpCall) -> Value:
    """x ** p keeps zeros for p > 0."""
    exponent = call.number("exponent")
    if exponent is not None and exponent > 0:
        return _elementwise(call, all)
    return makes_nonzero(call)


def clamp(call: OpCall) -> Value:
    """Zeros survive when zero lies inside the bounds."""
    low, high = call.get("min", call.get("min_val", -1)), call.get("max", call.get("max_val", 1))
    if isinstance(low, Value) or isinstance(high, Value):
        return makes_nonzero(call)
    return _elementwise(call, as_first if low <= 0 <= high else never)


def where(call: OpCall) -> Value:
    """Choice between two tensors: zero where both are."""
    arguments = [call.args.get(name) for name in ("condition", "self", "other")]
    values = [a for a in arguments if isinstance(a, Value)]
    if any(call.number(name) for name in ("self", "other")):
        return _elementwise(call, never, values)
    return _elementwise(call, lambda zeros: all(zeros[1:]), values)


def masked_fill(call: OpCall) -> Value:
    """Zeros survive when the value filled in is zero."""
    values = [call.value("self"), call.value("mask")]
    return _elementwise(call, as_first if call.number("value") == 0 else never, values)


def glu(call: OpCall) -> Value:
    """a * sigmoid(b) over the two halves of a dimension."""
    x = call.value("self")
    axis = call.axis(default=-1)
    half = call.shape[axis]
    first, second = narrow(x.dims[axis], 0, half), narrow(x.dims[axis], half, half)
    unify(first, second)
    dims = [remap(d, const=False) for d in x.dims]
    dims[axis] = first
    give_role(first, "activated")
    return call.new(dims)


def fill(call: OpCall) -> Value:
    """A constant of the shape of the argument."""
    zero = call.number("value") == 0
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
    "prelu": prelu,
    "pow": power,
    "where": where,
    "masked_fill": masked_fill,
    "glu": glu,
    "fill": fill,
}
