"""Rules of `keras.ops` operations, by their names, and the helpers that layers share with them."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import tree

from secateur.keras.atoms import Atom, Factor, Factors, Value, atoms_in, freeze, name_kind, plain
from secateur.keras.graph import AxisGraph
from secateur.keras.trace import LayerCall


def broadcast(graph: AxisGraph, step: LayerCall, operands: Sequence[Any], *, adds: bool) -> None:
    """Element-wise with broadcasting. Two different axes that are added up are the residual stream."""
    values = [graph.value(x) if isinstance(x, keras.KerasTensor) else graph.constant(x) for x in operands]
    known = [value for value in values if value is not None]
    ends = [value[-1] for value in known if value and len(value[-1]) == 1 and atoms_in(value[-1])]
    if adds and len({id(atoms_in(end)[0]) for end in ends}) > 1:
        for end in ends:
            name_kind(end, "hidden")
    result = graph.broadcast(known, f"{step.path or step.operation.name} adds or multiplies what has no axis")
    graph.put(step.outputs[0], result)


def fold(value: Value, shape: Sequence[int | None]) -> Value | None:
    """Regroup the factors of a tensor into another shape (row-major); None where an axis would be split."""
    left: list[Factor] = [factor for factors in value for factor in factors if factor != 1]
    result: list[Factors] = []
    for size in shape:
        if size is None:
            if not left or left[0] is not None:
                return None
            result.append((left.pop(0),))
            continue
        factors = _take(left, size)
        if factors is None:
            return None
        result.append(factors)
    return tuple(result) if not left else None


def _take(left: list[Factor], size: int) -> Factors | None:
    """Remove factors with the product `size` from the front of a list; None where that would split an axis.

    A number that is too large is divided: its rest stays at the front.
    """
    factors: list[Factor] = []
    rest = size
    while rest > 1:
        factor = left.pop(0) if left else None
        if factor is None:
            return None
        extent = factor.root().size if isinstance(factor, Atom) else factor
        if rest % extent == 0:
            factors.append(factor)
            rest //= extent
        elif isinstance(factor, int) and factor % rest == 0:
            factors.append(rest)
            left.insert(0, factor // rest)
            rest = 1
        else:
            return None
    return tuple(factors) or (1,)


def drop(graph: AxisGraph, step: LayerCall, value: Value, axes: Sequence[int], *, keepdims: bool) -> None:
    """Sum, mean or maximum over some dimensions."""
    for axis in axes:
        freeze(value[axis], f"{step.path or step.operation.name} runs over it")
    dims = [(1,) if i in axes else dim for i, dim in enumerate(value) if keepdims or i not in axes]
    graph.put(step.outputs[0], tuple(dims))


def _same(graph: AxisGraph, step: LayerCall) -> None:
    tensors = step.tensors()
    graph.put(step.outputs[0], graph.value(tensors[0]))


def _binary(*, adds: bool) -> Callable[[AxisGraph, LayerCall], None]:
    def rule(graph: AxisGraph, step: LayerCall) -> None:
        operands = [x for x in tree.flatten((step.args, step.kwargs)) if x is not None]
        broadcast(graph, step, operands, adds=adds)

    return rule


def _reduce(graph: AxisGraph, step: LayerCall) -> None:
    value, axis = graph.value(step.tensors()[0]), step.operation.axis
    axes = range(len(value)) if axis is None else axis if isinstance(axis, list | tuple) else [axis]
    drop(graph, step, value, [a % len(value) for a in axes], keepdims=step.operation.keepdims)


def _transpose(graph: AxisGraph, step: LayerCall) -> None:
    value = graph.value(step.tensors()[0])
    order = step.operation.axes or tuple(reversed(range(len(value))))
    graph.put(step.outputs[0], tuple(value[i] for i in order))


def _swap(graph: AxisGraph, step: LayerCall) -> None:
    value = list(graph.value(step.tensors()[0]))
    a, b = step.operation.axis1, step.operation.axis2
    value[a], value[b] = value[b], value[a]
    graph.put(step.outputs[0], tuple(value))


def _reshape(graph: AxisGraph, step: LayerCall) -> None:
    value = graph.value(step.tensors()[0])
    folded = fold(value, step.outputs[0].shape)
    sizes = tree.flatten(step.operation.newshape)
    fixed = [f for f in (folded or value) if atoms_in(f)]
    if folded is None or len(fixed) > 1 or (fixed and (sizes[-1] != -1 or folded[-1] is not fixed[0])):
        for dim in value:  # rebuilding cannot change a size that is written in the code
            freeze(dim, f"{step.operation.name} writes its size down")
    graph.put(step.outputs[0], folded or plain(step.outputs[0].shape))


def _expand(graph: AxisGraph, step: LayerCall) -> None:
    value, axes = list(graph.value(step.tensors()[0])), step.operation.axis
    axes = axes if isinstance(axes, list | tuple) else [axes]
    for axis in sorted(a % (len(value) + len(axes)) for a in axes):
        value.insert(axis, (1,))
    graph.put(step.outputs[0], tuple(value))


def _squeeze(graph: AxisGraph, step: LayerCall) -> None:
    value, axis = graph.value(step.tensors()[0]), step.operation.axis
    axes = [i for i, d in enumerate(value) if d == (1,)] if axis is None else tree.flatten(axis)
    axes = [a % len(value) for a in axes]
    graph.put(step.outputs[0], tuple(d for i, d in enumerate(value) if i not in axes))


def _item(graph: AxisGraph, step: LayerCall) -> None:
    """x[:, 0], x[..., None]: a dimension of which a part is taken loses its axis."""
    value, key = list(graph.value(step.tensors()[0])), step.args[1]
    key = key if isinstance(key, tuple) else (key,)
    indexed = sum(k is not None and k is not Ellipsis for k in key)
    whole = [slice(None)] * (len(value) - indexed)
    ellipsis = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    result: list[Factors] = []
    for k in (*key[:ellipsis], *whole, *key[ellipsis + 1 :]):
        if k is None:
            result.append((1,))
            continue
        dim = value.pop(0)
        if isinstance(k, slice) and k == slice(None):
            result.append(dim)
            continue
        freeze(dim, f"{step.operation.name} takes a part of it")
        if isinstance(k, slice):
            result.append((step.outputs[0].shape[len(result)],))
    graph.put(step.outputs[0], tuple(result))


def _softmax(graph: AxisGraph, step: LayerCall) -> None:
    value = graph.value(step.tensors()[0])
    for axis in tree.flatten(step.operation.axis):
        freeze(value[axis], f"{step.operation.name} mixes its units")
    graph.put(step.outputs[0], value)


def _concatenate(graph: AxisGraph, step: LayerCall) -> None:
    values = [
        graph.value(x) if isinstance(x, keras.KerasTensor) else graph.constant(x) for x in tree.flatten(step.args[0])
    ]
    known = [value for value in values if value is not None]
    axis = step.operation.axis % len(known[0])
    for value in known:
        freeze(value[axis], f"{step.operation.name} puts it beside others")
    rest = graph.broadcast([(*v[:axis], (1,), *v[axis + 1 :]) for v in known], "concatenated parts differ")
    graph.put(step.outputs[0], (*rest[:axis], (step.outputs[0].shape[axis],), *rest[axis + 1 :]))


_UNARY = (
    "Absolute Abs Cast Ceil Clip Copy Cos Cosh Elu Exp Expm1 Floor Gelu HardSigmoid HardSilu HardTanh "
    "LeakyRelu Log Log1p LogSigmoid Negative Reciprocal Relu Relu6 Round Selu Sigmoid Sign Silu Sin Softplus "
    "Softsign Sqrt Square StopGradient Tanh TanhShrink LogicalNot OnesLike ZerosLike Rsqrt Erf"
)
OPERATIONS: dict[str, Callable[[AxisGraph, LayerCall], None]] = {
    **dict.fromkeys(_UNARY.split(), _same),
    **dict.fromkeys(("Add", "Subtract"), _binary(adds=True)),
    **dict.fromkeys(
        [
            "Multiply",
            "Divide",
            "TrueDivide",
            "DivideNoNan",
            "Maximum",
            "Minimum",
            "Power",
            "Equal",
            "NotEqual",
            "Greater",
            "GreaterEqual",
            "Less",
            "LessEqual",
            "LogicalAnd",
            "LogicalOr",
            "Where",
        ],
        _binary(adds=False),
    ),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min", "Prod", "Any", "All"), _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "Transpose": _transpose,
    "Swapaxes": _swap,
    "Reshape": _reshape,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "GetItem": _item,
    "Concatenate": _concatenate,
}
