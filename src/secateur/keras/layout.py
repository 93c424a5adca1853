"""Layout of a Keras model from the types of its layers: rules walk its trace, then axes get their names."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import tree

from secateur.dims import Dim, Factor
from secateur.keras.atoms import Atom, Factors, Value, atoms_in, freeze, name_kind, plain
from secateur.keras.graph import AxisGraph
from secateur.keras.naming import variables
from secateur.keras.rules import rule_for
from secateur.keras.trace import LayerCall, Trace, trace
from secateur.layout import Axis, Layout, Linear, Product


class Description:
    """A model described: its layout, its trace, and the axes of every tensor of the trace."""

    def __init__(self, model: keras.Model, inputs: Any, batch: int = 1, length: int = 1) -> None:
        self.trace: Trace = trace(model, inputs, lambda operation: rule_for(operation) is not None)
        self.graph = AxisGraph(batch, length)
        _walk(self.graph, self.trace.steps)
        for output in tree.flatten(self.trace.outputs):
            for dim in self.graph.value(output)[1:]:
                if len(dim) == 1:
                    name_kind(dim, "classes")
                freeze(dim, "an output of the model")
        self.names = _axis_names(self.graph)
        self.layout = _layout(self.graph, self.names, variables(model))

    def dims(self, tensor: Any) -> "tuple[Dim | None, ...]":
        """The dimensions of a tensor of the trace, in axes; None for open dimensions."""
        value = self.graph.value(tensor)
        return tuple(None if None in factors else _dim(factors, self.names) for factors in value)


def _walk(graph: AxisGraph, steps: list[LayerCall]) -> None:
    for step in steps:
        rule = rule_for(step.operation)
        if step.opaque is not None:
            graph.opaque(step, step.opaque)
        elif step.inner:
            _walk_inside(graph, step)
        elif rule is None:
            graph.opaque(step, f"{step.operation.name} ({type(step.operation).__name__}) has no rule")
        else:
            rule(graph, step)


def _walk_inside(graph: AxisGraph, step: LayerCall) -> None:
    """Describe a layer with weights of its own; layers inside it keep their sizes, because it is rebuilt whole."""
    before = set(graph.weights)
    _walk(graph, step.inner)
    reason = f"{step.path} ({type(step.operation).__name__}) uses weights of its own in Python code"
    for key, dims in graph.weights.items():
        if key not in before:
            graph.freeze(dims, reason)
    for returned, computed in zip(step.outputs, step.inner_outputs, strict=True):
        graph.put(returned, graph.value(computed))


def _axis_names(graph: AxisGraph) -> dict[Atom, str]:
    """A name for every axis that a weight carries, in order of appearance."""
    names: dict[Atom, str] = {}
    taken: set[str] = set()
    for value in graph.weights.values():
        for factors in value:
            for atom in atoms_in(factors):
                if atom not in names:
                    names[atom] = ""
    plain_mlp = graph.depth < 0
    number = 0
    for atom in names:
        if atom.kind in ("hidden", "vocab", "classes", "channel", "position"):
            name = atom.kind
        elif plain_mlp:
            name, number = f"L{number}.{atom.kind}", number + 1
        else:
            name = f"L{max(atom.depth, 0)}.{atom.kind}"
        unique, count = name, 2
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        names[atom] = unique
    return names


def _dim(factors: Factors, names: Mapping[Atom, str]) -> Dim:
    term: list[Factor] = []
    for factor in factors:
        if isinstance(factor, Atom):
            term.append(names.get(factor.root(), factor.root().size))
        elif factor is not None:
            term.append(factor)
    return (tuple(term),)


def _dims(value: Value, names: Mapping[Atom, str]) -> tuple[Dim, ...]:
    return tuple(_dim(factors, names) for factors in value)


def _layout(graph: AxisGraph, names: Mapping[Atom, str], variables: Mapping[str, Any]) -> Layout:
    axes = {name: Axis(name, atom.size, atom.kind, atom.frozen) for atom, name in names.items()}
    for _, kv, heads in graph.attentions:
        if len(heads) > 1:
            parts = tuple(names[atom] for atom in atoms_in(heads))
            axes[parts[1]] = Axis(
                parts[1], axes[parts[1]].size, "group", "query heads are pruned, equally in each group"
            )
            whole = f"L{kv.root().depth}.head"
            size = axes[parts[0]].size * axes[parts[1]].size
            axes.setdefault(whole, Axis(whole, size, "head", axes[parts[0]].frozen, parts))
    params: dict[str, tuple[Dim, ...]] = {}
    linears: dict[str, Linear] = {}
    numbers: dict[int, str] = {}
    sources: dict[int, str] = {}
    for name, variable in variables.items():
        value = graph.weights.get(id(variable), plain(tuple(variable.shape)))
        params[name] = _dims(value, names)
        numbers[id(variable)] = name
        read = graph.reads.get(id(variable))
        if read is not None:
            source = sources.setdefault(id(read.tensor), f"x{len(sources)}")
            linears[name] = Linear(source, read.contracted[-1], read.contracted[:-1])
    products = tuple(
        Product(None if key is None else numbers[key], calls, _dims(value, names))
        for key, calls, value in graph.products
        if key is None or key in numbers
    )
    return Layout(axes, params, linears, products)
