"""trace: a Keras model as the flat list of the layers and operations it calls.

Functional, Sequential, nested and subclassed models are followed in one way: `call` is run on symbolic tensors
(`keras.KerasTensor`), which records a graph; layers that no rule describes are entered in turn. A layer that cannot be
called symbolically stays one step, with the reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree

from secateur.errors import ModelError
from secateur.keras.naming import layers, own_variables


@dataclass(eq=False)
class LayerCall:
    """One call of a layer or operation.

    path: the layer's name in the model, None for operations.
    opaque: why nothing is known of the step, or None.
    inner: the steps inside a layer that mixes weights of its own with other layers; they describe the layer, which can
    only be rebuilt as a whole.
    inner_outputs: the tensors that the inner steps compute for `outputs`.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    path: str | None = None
    opaque: str | None = None
    inner: list["LayerCall"] = field(default_factory=list)
    inner_outputs: list[Any] = field(default_factory=list)

    def tensors(self) -> list[Any]:
        """The symbolic tensors that the step reads."""
        return [x for x in tree.flatten((self.args, self.kwargs)) if isinstance(x, keras.KerasTensor)]


@dataclass(eq=False)
class Trace:
    """Inputs and outputs in the structure that the model has, and its steps in the order of execution."""

    inputs: Any
    outputs: Any
    steps: list[LayerCall]


def trace(model: keras.Model, inputs: Any, described: Callable[[Any], bool]) -> Trace:
    """Follow a built model on symbolic inputs.

    described: whether a layer or operation has a rule and need not be entered.
    Raises ModelError when the model itself cannot be called on symbolic tensors.
    """
    paths = {id(layer): path for path, layer in layers(model)}
    marks = [(layer, len(layer._inbound_nodes), len(layer._outbound_nodes)) for _, layer in layers(model)]
    known = {id(x) for x in tree.flatten(inputs)}
    walk = _Tracer(paths, described, known)
    try:
        outputs = _enter(model, (inputs,), {})
    except Exception as error:  # `call` is the user's code
        raise ModelError(
            f"{model.name} cannot be followed on symbolic tensors ({line(error)}); write `call` with keras.ops, or "
            "pass layout="
        ) from error
    try:
        steps = walk.back_from(outputs)
        return Trace(inputs, tree.map_structure(walk.real, outputs), steps)
    finally:
        for layer, inbound, outbound in marks:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]


class _Tracer:
    """Collects steps backwards from outputs.

    `_alias` leads from the tensor that a layer returned to the tensor that a step inside the layer computed.
    """

    def __init__(self, paths: dict[int, str], described: Callable[[Any], bool], known: set[int]) -> None:
        self._paths, self._described, self._known = paths, described, known
        self._alias: dict[int, Any] = {}
        self._keep: list[Any] = []

    def real(self, tensor: Any) -> Any:
        """The tensor that a step computes."""
        while id(tensor) in self._alias:
            tensor = self._alias[id(tensor)]
        return tensor

    def _resolved(self, structure: Any) -> Any:
        return tree.map_structure(lambda x: self.real(x) if isinstance(x, keras.KerasTensor) else x, structure)

    def back_from(self, outputs: Any) -> list[LayerCall]:
        """Steps that compute the outputs from known tensors, in order."""
        steps: list[LayerCall] = []
        for node in self._order(outputs):
            steps += self._steps(node)
            self._known.update(id(x) for x in node.outputs)
        return steps

    def _order(self, outputs: Any) -> Iterator[Any]:
        done: set[int] = set()
        stack = [(self._node(x), False) for x in reversed(tree.flatten(outputs)) if self._unknown(x)]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                yield node
                continue
            stack.append((node, True))
            stack += [(self._node(x), False) for x in reversed(node.arguments.keras_tensors) if self._unknown(x)]

    def _unknown(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, keras.KerasTensor) and id(tensor) not in self._known and self._node(tensor) is not None
        )

    @staticmethod
    def _node(tensor: Any) -> Any:
        history = getattr(tensor, "_keras_history", None)
        if history is None or history.operation is None:
            return None
        return history.operation._inbound_nodes[history.node_index]

    def _steps(self, node: Any) -> list[LayerCall]:
        operation = node.operation
        args, kwargs = self._resolved(node.arguments.args), self._resolved(node.arguments.kwargs)
        path = self._paths.get(id(operation))
        if type(operation).__name__ == "ConvertToTensor" and isinstance(args[0], keras.KerasTensor):
            self._alias[id(node.outputs[0])] = args[0]  # a functional model passes its inputs through it
            return []
        step = LayerCall(operation, args, kwargs, list(node.outputs), path)
        if self._described(operation) or not isinstance(operation, keras.Layer):
            return [step]
        if path is None:
            step.opaque = f"{type(operation).__name__} is made inside a call and not kept as a part of the model"
            return [step]
        try:
            outputs = _enter(operation, args, kwargs)
            if len(tree.flatten(outputs)) != len(node.outputs):
                raise ModelError("its outputs differ from call to call")
            inner = self.back_from(outputs)
        except Exception as error:  # `call` is the user's code
            step.opaque = f"{path} ({type(operation).__name__}) cannot be described: {line(error)}"
            return [step]
        self._keep.append(outputs)
        if own_variables(operation) or not inner:
            step.inner = inner
            step.inner_outputs = [self.real(x) for x in tree.flatten(outputs)]
            return [step]
        for returned, computed in zip(node.outputs, tree.flatten(outputs), strict=True):
            self._alias[id(returned)] = computed
        return inner


def _enter(layer: keras.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer.call(*args, **kwargs)


def line(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = [text for text in str(error).splitlines() if text.strip()]
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")[:200]
