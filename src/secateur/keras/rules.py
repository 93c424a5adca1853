"""What each type of layer does to axes: one function a type. A layer counts as of a type only when it runs that type's
own `call`; a subclass that computes something else is entered, or left opaque.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers as kl

from secateur.keras.atoms import Factors, Value, atoms_in, freeze, name_kind, plain
from secateur.keras.graph import AxisGraph
from secateur.keras.operations import OPERATIONS, broadcast, drop, fold
from secateur.keras.trace import LayerCall

Rule = Callable[[AxisGraph, LayerCall], None]


def _argument(step: LayerCall, position: int, name: str) -> Any:
    if len(step.args) > position:
        return step.args[position]
    return step.kwargs.get(name)


def dense(graph: AxisGraph, step: LayerCall) -> None:
    """x W + b: the last dimension is contracted."""
    layer, x = step.operation, step.args[0]
    value = graph.value(x)
    out = graph.known(layer.kernel, 1, layer.units, "ffn")
    graph.linear(layer.kernel, (value[-1], out), x, (0,), value[:-1])
    if layer.bias is not None:
        graph.weight(layer.bias, (out,))
    _activation(layer, out)
    graph.put(step.outputs[0], (*value[:-1], out))


def einsum_dense(graph: AxisGraph, step: LayerCall) -> None:
    """x W + b by an equation such as `abc,cde->abde`."""
    layer, x = step.operation, step.args[0]
    value = graph.value(x)
    inputs, weight, output = letters(layer, len(value))
    known = dict(zip(inputs, value, strict=True))
    dims = []
    for position, letter in enumerate(weight):
        if letter not in known:
            known[letter] = graph.known(layer.kernel, position, layer.kernel.shape[position], "ffn")
        dims.append(known[letter])
    contracted = tuple(i for i, letter in enumerate(weight) if letter in inputs and letter not in output)
    positions = tuple(known[letter] for letter in inputs if letter not in weight)
    if any(letter in inputs and letter in output for letter in weight):
        for dim in dims:
            freeze(dim, f"{step.path} has one matrix for each unit of a dimension")
    if contracted:
        graph.linear(layer.kernel, tuple(dims), x, contracted, positions)
    else:
        graph.weight(layer.kernel, tuple(dims))
    if layer.bias is not None:
        graph.weight(layer.bias, _aligned([known[letter] for letter in output], layer.bias.shape))
    result = tuple(known[letter] for letter in output)
    _activation(layer, result[-1])
    graph.put(step.outputs[0], result)


def letters(layer: Any, rank: int) -> tuple[str, str, str]:
    """The letters of input, weight and output of an EinsumDense, an ellipsis spelled out."""
    left, _, output = layer.equation.replace(" ", "").partition("->")
    inputs, _, weight = left.partition(",")
    if "." in inputs:
        free = "ABCDEFGHIJ"[: rank - len(inputs.replace(".", ""))]
        inputs, output = inputs.replace("...", free), output.replace("...", free)
    return inputs, weight, output


def _aligned(dims: list[Factors], shape: tuple[int, ...]) -> Value:
    """Dimensions of a bias of that shape: the last ones of the output, 1 where it broadcasts."""
    tail = dims[len(dims) - len(shape) :]
    return tuple((1,) if n == 1 and not atoms_in(dim) else dim for n, dim in zip(shape, tail, strict=True))


def _activation(layer: Any, dim: Factors) -> None:
    if getattr(layer.activation, "__name__", "") in ("softmax", "log_softmax", "glu", "sparsemax"):
        freeze(dim, f"{layer.activation.__name__} in {layer.name} mixes its units")


def attention(graph: AxisGraph, step: LayerCall) -> None:
    """MultiHeadAttention and GroupedQueryAttention: projections, heads, and the output projection."""
    layer = step.operation
    query, value = _argument(step, 0, "query"), _argument(step, 1, "value")
    key = _argument(step, 2, "key")
    key = value if key is None else key
    graph.depth += 1
    grouped = isinstance(layer, kl.GroupQueryAttention)
    q, k, v, o = layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense
    kv = graph.known(k.kernel, 1, k.kernel.shape[1], "kv" if grouped else "head")
    heads = kv
    if grouped:
        earlier = graph.weights.get(id(q.kernel))
        group = earlier[1][1:] if earlier else graph.new(q.kernel.shape[1] // k.kernel.shape[1], "group")
        heads = (*kv, *group)
    qk = graph.known(q.kernel, 2, q.kernel.shape[2], "qk")
    out_v = graph.known(v.kernel, 2, v.kernel.shape[2], "v")
    if grouped:
        for dim in (qk, out_v):
            freeze(dim, f"{step.path} has one size for query, key and value")
    for tensor, part, middle, last in ((query, q, heads, qk), (key, k, kv, qk), (value, v, kv, out_v)):
        _project(graph, tensor, part, middle, last)
    if layer._gate_dense if getattr(layer, "_use_gate", getattr(layer, "use_gate", False)) else None:
        _project(graph, query, layer._gate_dense, heads, out_v)
    outs = tuple(graph.known(o.kernel, 2 + i, n, "ffn") for i, n in enumerate(o.kernel.shape[2:]))
    positions = graph.value(query)[:-1]
    graph.linear(o.kernel, (heads, out_v, *outs), step.outputs[0], (0, 1), positions)
    if o.bias is not None:
        graph.weight(o.bias, _aligned([*positions, *outs], o.bias.shape))
    _attention_products(graph, query, value, heads, qk, out_v)
    graph.attentions.append((layer, atoms_in(kv)[0], heads))
    graph.put(step.outputs[0], (*positions, *outs))
    for scores in step.outputs[1:]:
        dims = plain(scores.shape)
        graph.put(scores, (dims[0], heads, *dims[2:]))
    for name in ("attention_mask", "query_mask", "value_mask", "key_mask"):
        if isinstance(step.kwargs.get(name), keras.KerasTensor):
            graph.freeze(graph.value(step.kwargs[name]), f"it masks {step.path}")


def _project(graph: AxisGraph, tensor: Any, part: Any, middle: Factors, last: Factors) -> None:
    value = graph.value(tensor)
    graph.linear(part.kernel, (value[-1], middle, last), tensor, (0,), value[:-1])
    if part.bias is not None:
        graph.weight(part.bias, (middle, last))


def _attention_products(graph: AxisGraph, query: Any, value: Any, heads: Factors, qk: Factors, v: Factors) -> None:
    count = graph.count(graph.value(query)[:-1]) * graph.count(graph.value(value)[1:-1], 1)
    graph.products += [(None, count, (heads, qk)), (None, count, (heads, v))]


def embedding(graph: AxisGraph, step: LayerCall) -> None:
    """Rows of a table by number."""
    layer = step.operation
    out = graph.known(layer.embeddings, 1, layer.output_dim, "hidden")
    rows = graph.known(layer.embeddings, 0, layer.input_dim, "vocab")
    freeze(rows, f"rows of {step.path} are looked up by number")
    graph.weight(layer.embeddings, (rows, out))
    graph.put(step.outputs[0], (*graph.value(step.args[0]), out))


def normalization(graph: AxisGraph, step: LayerCall) -> None:
    """LayerNormalization, RMSNormalization, GroupNormalization: statistics over units, so none of them can go."""
    layer, value = step.operation, graph.value(step.args[0])
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    dims = [value[axis] for axis in axes]
    for dim in dims:
        freeze(dim, f"{type(layer).__name__} takes its statistics over it")
        name_kind(dim, "hidden")
    for name in ("gamma", "beta", "scale"):
        variable = getattr(layer, name, None)
        if isinstance(variable, keras.Variable):
            graph.weight(variable, tuple(dims) if len(variable.shape) == len(dims) else plain(variable.shape))
    graph.put(step.outputs[0], value)


def batch_normalization(graph: AxisGraph, step: LayerCall) -> None:
    """Each unit has its own statistics: units can go."""
    layer, value = step.operation, graph.value(step.args[0])
    dim = value[layer.axis]
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        variable = getattr(layer, name, None)
        if variable is not None:
            graph.weight(variable, (dim,))
    graph.put(step.outputs[0], value)


def convolution(graph: AxisGraph, step: LayerCall) -> None:
    """Conv1D, Conv2D, Conv3D without groups: the last two dimensions of the kernel are channels in and out."""
    layer, value = step.operation, graph.value(step.args[0])
    channel = -1 if layer.data_format == "channels_last" else 1
    kernel = layer._kernel if hasattr(layer, "_kernel") else layer.kernel
    out = graph.known(kernel, len(kernel.shape) - 1, layer.filters, "channel")
    if layer.groups != 1:
        freeze(value[channel], f"{step.path} has groups")
        freeze(out, f"{step.path} has groups")
        dims = (*plain(kernel.shape[:-1]), out)
    else:
        dims = (*plain(kernel.shape[:-2]), value[channel], out)
    graph.weight(kernel, dims)
    if layer.bias is not None:
        graph.weight(layer.bias, (out,))
    _activation(layer, out)
    result = list(plain(step.outputs[0].shape))
    result[channel] = out
    calls = graph.count(tuple((1,) if dim is out else dim for dim in result))
    graph.products.append((id(kernel), calls, dims))
    graph.put(step.outputs[0], tuple(result))


def same(graph: AxisGraph, step: LayerCall) -> None:
    """Element by element, no weights."""
    graph.put(step.outputs[0], graph.value(step.args[0]))


def softmax(graph: AxisGraph, step: LayerCall) -> None:
    """Softmax mixes the units of its axis."""
    value, axes = graph.value(step.args[0]), step.operation.axis
    for axis in axes if isinstance(axes, list | tuple) else [axes]:
        freeze(value[axis], f"softmax in {step.path} mixes its units")
    graph.put(step.outputs[0], value)


def activation(graph: AxisGraph, step: LayerCall) -> None:
    """An Activation layer."""
    value = graph.value(step.args[0])
    _activation(step.operation, value[-1])
    graph.put(step.outputs[0], value)


def merge(graph: AxisGraph, step: LayerCall) -> None:
    """Add, Multiply, Average, ... of a list of tensors."""
    broadcast(graph, step, list(step.args[0]), adds=type(step.operation).__name__ in ("Add", "Subtract", "Average"))


def concatenate(graph: AxisGraph, step: LayerCall) -> None:
    """Side by side along an axis without units, such as positions."""
    values = [graph.value(x) for x in step.args[0]]
    axis = step.operation.axis % len(values[0])
    for value in values:
        freeze(value[axis], f"{step.path or step.operation.name} puts it beside others")
    rest = graph.broadcast([(*v[:axis], (1,), *v[axis + 1 :]) for v in values], "concatenated parts differ")
    graph.put(step.outputs[0], (*rest[:axis], (step.outputs[0].shape[axis],), *rest[axis + 1 :]))


def reshape(graph: AxisGraph, step: LayerCall) -> None:
    """Reshape and Flatten: factors are regrouped, an axis is never split."""
    value = fold(graph.value(step.args[0]), step.outputs[0].shape)
    if value is None:
        return graph.opaque(step, f"{step.path} splits it")
    graph.put(step.outputs[0], value)


def permute(graph: AxisGraph, step: LayerCall) -> None:
    """Permute."""
    value = graph.value(step.args[0])
    graph.put(step.outputs[0], (value[0], *(value[i] for i in step.operation.dims)))


def repeat(graph: AxisGraph, step: LayerCall) -> None:
    """RepeatVector."""
    value = graph.value(step.args[0])
    graph.put(step.outputs[0], (value[0], (step.outputs[0].shape[1],), value[1]))


def spatial(graph: AxisGraph, step: LayerCall) -> None:
    """Pooling, padding, cropping and upsampling: positions change, channels stay."""
    layer, value = step.operation, graph.value(step.args[0])
    channel = -1 if getattr(layer, "data_format", "channels_last") == "channels_last" else 1
    result = list(plain(step.outputs[0].shape))
    result[channel] = value[channel]
    graph.put(step.outputs[0], tuple(result))


def pool(graph: AxisGraph, step: LayerCall) -> None:
    """Global pooling: one value a channel."""
    layer, value = step.operation, graph.value(step.args[0])
    channel = len(value) - 1 if layer.data_format == "channels_last" else 1
    drop(graph, step, value, [i for i in range(1, len(value)) if i != channel], keepdims=layer.keepdims)


_ELEMENTWISE = (
    "Dropout SpatialDropout1D SpatialDropout2D GaussianDropout GaussianNoise AlphaDropout Identity "
    "ActivityRegularization Masking ReLU LeakyReLU ELU Rescaling"
)
_SPATIAL = (
    "MaxPooling1D MaxPooling2D AveragePooling1D AveragePooling2D ZeroPadding1D ZeroPadding2D Cropping1D "
    "Cropping2D UpSampling1D UpSampling2D"
)
_TABLE: dict[type, Rule] = {
    kl.Dense: dense,
    kl.EinsumDense: einsum_dense,
    kl.MultiHeadAttention: attention,
    kl.GroupQueryAttention: attention,
    kl.Embedding: embedding,
    kl.LayerNormalization: normalization,
    kl.RMSNormalization: normalization,
    kl.BatchNormalization: batch_normalization,
    kl.Conv1D: convolution,
    kl.Conv2D: convolution,
    kl.Conv3D: convolution,
    kl.Activation: activation,
    kl.Softmax: softmax,
    kl.Concatenate: concatenate,
    kl.Reshape: reshape,
    kl.Flatten: reshape,
    kl.Permute: permute,
    kl.RepeatVector: repeat,
    **{getattr(kl, name): merge for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")},
    **{getattr(kl, name): same for name in _ELEMENTWISE.split()},
    **{getattr(kl, name): spatial for name in _SPATIAL.split()},
    **{getattr(kl, f"Global{kind}Pooling{n}D"): pool for kind in ("Average", "Max") for n in (1, 2)},
}


def rule_for(operation: Any) -> Rule | None:
    """The rule of a layer or operation, or None: a layer whose `call` is not its type's own has none."""
    if not isinstance(operation, keras.Layer):
        return OPERATIONS.get(type(operation).__name__) if type(operation).__module__.startswith("keras.") else None
    base = base_of(operation)
    if base is None or getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False):
        return None
    return _TABLE[base]


def base_of(layer: Any) -> type | None:
    """The known layer type whose computation a layer runs."""
    for base in type(layer).__mro__:
        if base in _TABLE:
            own = [name for name in ("call", "build", "_compute_attention") if hasattr(base, name)]
            return base if all(getattr(type(layer), name) is getattr(base, name) for name in own) else None
    return None
