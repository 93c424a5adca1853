"""An ONNX graph with its edges, for the rewriting in `sparse` and `int8`: which node makes a value, which nodes read
it, what shape it has, and how nodes are replaced.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

DOMAIN = "secateur"
LAST = (-1, 3)
"""Numbers of the last of four dimensions."""


class OnnxGraph:
    """One model's graph. `replace` notes what changes; `finish` writes it into the model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.kept = {port.name for port in model.graph.output}
        ports = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self._shapes = {port.name: shape for port in ports if (shape := _shape(port)) is not None}
        self.changed = False
        self._index()

    def _index(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def maker(self, name: str, *kinds: str) -> Any:
        """The node that makes a value, if it is of one of those kinds, or None."""
        node = self.makers.get(name)
        return node if node is not None and is_standard(node, *kinds) else None

    def behind(self, node: Any, *kinds: str) -> Any:
        """The node that is reached from `node` by stepping from a node to the maker of one of its inputs, once for each
        of the kinds; None where there is none, or where `node` is None.
        """
        for kind in kinds:
            makers = (self.maker(name, kind) for name in (node.input if node is not None else ()))
            node = next((maker for maker in makers if maker is not None), None)
        return node

    def only_reader(self, name: str, *kinds: str) -> Any:
        """The only node that reads a value that is no output of the graph, if it is of one of those kinds, or None."""
        readers = self.readers[name]
        if len(readers) != 1 or name in self.kept or list(readers[0].input).count(name) != 1:
            return None
        return readers[0] if is_standard(readers[0], *kinds) else None

    def shape(self, name: str) -> list[int | str] | None:
        """The sizes of a value, those that are not fixed as names, or None where they are not known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        return self._shapes.get(name)

    def floats(self, name: str, *shape: int) -> bool:
        """Whether a value is a constant of float32 numbers of that shape."""
        import onnx

        tensor = self.constants.get(name)
        return tensor is not None and list(tensor.dims) == list(shape) and tensor.data_type == onnx.TensorProto.FLOAT

    def scalar(self, name: str) -> float | None:
        """The value of a constant that holds one number, or None."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(onnx.numpy_helper.to_array(tensor).reshape(()))

    def add_constant(self, array: np.ndarray, name: str) -> str:
        """Keep an array as a constant of the graph; returns its name."""
        import onnx

        self.constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def replace(self, taken: list[Any], operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Put one of secateur's operators in the place of nodes, where the last of them stands."""
        import onnx

        while inputs and not inputs[-1]:
            inputs.pop()
        name = taken[0].name or output
        self.exchange(
            taken, [onnx.helper.make_node(operator, inputs, [output], name=name, domain=DOMAIN, **attributes)]
        )

    def exchange(self, taken: list[Any], nodes: list[Any]) -> None:
        """Put `nodes` in the place of `taken`, where the last of the latter stands. A value that changes its type or
        shape must get another name: the graph keeps its notes on types and shapes of values that a node still makes.
        """
        removed = {id(n) for n in taken}
        last = max(i for i, n in enumerate(self.nodes) if id(n) in removed)
        before, after = ([n for n in part if id(n) not in removed] for part in (self.nodes[:last], self.nodes[last:]))
        self.nodes = [*before, *nodes, *after]
        self.changed = True
        self._index()

    def tidy(self) -> set[str]:
        """Drop nodes whose values nobody reads; returns the names of all values that are read."""
        alive, used = [], set(self.kept)
        for node in reversed(self.nodes):
            if used.isdisjoint(node.output):
                continue
            alive.append(node)
            used |= set(node.input) | _inner_names(node)
        self.nodes = alive[::-1]
        self._index()
        return used

    def finish(self) -> None:
        """Write what was replaced into the model, without what nobody reads, and without notes on constants, which
        state their types and shapes themselves.
        """
        import onnx

        if not self.changed:
            return
        used = self.tidy()
        graph = self.model.graph
        made = {name for node in self.nodes for name in node.output} | {port.name for port in graph.input}
        ours = any(node.domain == DOMAIN for node in self.nodes)
        for field, values in (
            (graph.node, self.nodes),
            (graph.initializer, [tensor for name, tensor in self.constants.items() if name in used]),
            (graph.value_info, [info for info in graph.value_info if info.name in made]),
        ):
            del field[:]
            field.extend(values)
        if ours and all(entry.domain != DOMAIN for entry in self.model.opset_import):
            self.model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def is_standard(node: Any, *kinds: str) -> bool:
    """Whether a node is one of those operators of the ONNX standard."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def is_plain(graph: OnnxGraph, norm: Any, rows: int) -> bool:
    """Whether a LayerNormalization runs over the last dimension alone, with constants, and gives only its result."""
    axis = attributes(norm).get("axis", -1)
    shape = graph.shape(norm.input[0])
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        return False
    shift = norm.input[2] if len(norm.input) > 2 else ""
    if not graph.floats(norm.input[1], rows) or (shift and not graph.floats(shift, rows)):
        return False
    return not any(name and (graph.readers[name] or name in graph.kept) for name in norm.output[1:])


def attributes(node: Any) -> dict[str, Any]:
    """The attributes of a node by name."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _shape(port: Any) -> list[int | str] | None:
    kind = port.type.tensor_type
    if not kind.HasField("shape"):
        return None
    sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
    return sizes if all(size != "" for size in sizes) else None


def _inner_names(node: Any) -> set[str]:
    """Values of the outer graph that the graphs inside a node (If, Loop) may read."""
    names: set[str] = set()
    graphs: Iterable[Any] = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    for graph in graphs:
        for inner in graph.node:
            names |= set(inner.input) | _inner_names(inner)
        names |= {port.name for port in graph.output}
    return names


def other(node: Any, name: str) -> str:
    """The other input of a sum or product."""
    return str(node.input[1] if node.input[0] == name else node.input[0])
