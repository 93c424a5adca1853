"""Finds in the traced graph of a model what the kernels can compute along with a linear layer (an activation, a gate, a
residual and a norm after it), and norms that are written in single operations of torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from secateur.runtime.layers.fused import Fusion, Gated, LinearAddNorm, PrimitiveNorm
from secateur.runtime.program.from_fx import (
    CHECKS,
    COPIES,
    NORMS,
    Traced,
    activation_of,
    arguments,
    aten,
    common,
    epsilon_of,
    only_reader,
    origin,
    positional,
    stack,
)


@dataclass(frozen=True)
class Fusions:
    """The fusions of a model, by paths of modules.

    - `activations`: linear layer -> (module of the activation, name of the activation). The module runs once and holds
      no other operation, so that an nn.Identity can replace it.
    - `modules`: module -> how it runs as one call of the kernels
    """

    activations: dict[str, tuple[str, str]] = field(default_factory=dict)
    modules: dict[str, Fusion] = field(default_factory=dict)


def find_fusions(traced: Traced) -> Fusions:
    """What can be fused into the linear layers of a traced model."""
    finder = _Finder(traced)
    activations = dict(filter(None, map(finder.activation, finder.linears)))
    modules: dict[str, Fusion] = {}
    modules |= dict(filter(None, (finder.linear_add_norm(node, activations) for node in finder.linears)))
    modules |= dict(filter(None, map(finder.gated, traced.operations)))
    modules |= finder.primitive_norms()
    return Fusions(activations, modules)


class _Finder:
    """Reads the operations around the linear layers of a traced model."""

    def __init__(self, traced: Traced):
        self.traced = traced
        linears = [node for node in traced.operations if node.target is aten.linear.default]
        self.linears = [n for n in linears if traced.parameter(n.args[1]) and traced.inside[traced.path(n)] == 1]

    def activation(self, linear: Node) -> tuple[str, tuple[str, str]] | None:
        """(layer, (module, name)) of the activation that is the only reader of a layer's output."""
        reader = only_reader(linear)
        name = "" if reader is None else activation_of(reader)
        if reader is None or not name:
            return None
        path = (stack(reader) or [""])[-1]
        if not path or not self.traced.is_free(path) or self.traced.inside[path] != 1:
            return None
        return self.traced.path(linear), (path, name)

    def linear_add_norm(self, linear: Node, activations: Mapping[str, Any]) -> tuple[str, LinearAddNorm] | None:
        """(module, fusion) of the innermost module that runs a linear layer, what follows it, and nothing else."""
        chain, reader = self._activation_and_dropout(linear, activations)
        residual = None
        if reader is not None and reader.target is aten.add.Tensor and arguments(reader)["alpha"] == 1:
            residual = reader.args[1] if reader.args[0] is chain[-1] else reader.args[0]
            if not self._is_like(residual, linear):
                return None
            chain, reader = [*chain, reader], only_reader(reader)
        norm: dict[str, Any] = {}
        path = common(chain if reader is None else [*chain, reader])
        if reader is not None and reader.target in NORMS and self.traced.inside[path] == len(chain) + 1:
            chain, norm = [*chain, reader], self._norm(reader, linear, path)
            if not norm:
                return None
        if residual is None and not norm:
            return None
        path = common(chain)
        if not self._holds_only(path, chain):
            return None
        x, residual_name = self._inputs(path, linear, residual)
        if x is None:
            return None
        names = positional(self.traced.modules[path])
        return path, LinearAddNorm(self.traced.path(linear).removeprefix(f"{path}."), names, x, residual_name, **norm)

    def _activation_and_dropout(self, linear: Node, activations: Mapping[str, Any]) -> tuple[list[Node], Node | None]:
        """A linear layer with the activation and the dropout that follow it, and what alone reads the last of these."""
        chain, reader = [linear], only_reader(linear)
        if reader is not None and activation_of(reader) and self.traced.path(linear) in activations:
            chain, reader = [*chain, reader], only_reader(reader)
        if reader is not None and _is_idle_dropout(reader):
            chain, reader = [*chain, reader], only_reader(reader)
        return chain, reader

    def gated(self, product: Node) -> tuple[str, Gated] | None:
        """(module, fusion) of the innermost module that computes a product of two layers of one tensor, one of them
        activated, with the layer that reads it if the module holds that too, and nothing else.
        """
        if product.target is not aten.mul.Tensor:
            return None
        for act, up in (product.args[:2], reversed(product.args[:2])):
            gate = act.all_input_nodes[0] if isinstance(act, Node) and activation_of(act) else None
            if gate is None or gate not in self.linears or up not in self.linears or gate.args[0] is not up.args[0]:
                continue
            edges = ((gate, act), (act, product), (up, product))
            if any(only_reader(before) is not after for before, after in edges):
                continue
            four = [gate, act, up, product]
            return self._gated(four, *self._down(product)) or self._gated(four, [], "")
        return None

    def _down(self, product: Node) -> tuple[list[Node], str]:
        """The layer that alone reads a product, with the dropout before it, and the path of the layer."""
        nodes, reader = [], only_reader(product)
        if reader is not None and _is_idle_dropout(reader):
            nodes, reader = [reader], only_reader(reader)
        if reader is None or reader not in self.linears:
            return [], ""
        return [*nodes, reader], self.traced.path(reader)

    def _gated(self, four: list[Node], down_nodes: list[Node], down: str) -> tuple[str, Gated] | None:
        gate, act, up, _ = four
        nodes = [*four, *down_nodes]
        path = common(nodes)
        if not self._holds_only(path, nodes):
            return None
        x, _ = self._inputs(path, gate, None)
        if x is None:
            return None
        layers = (self.traced.path(gate), self.traced.path(up), down)
        gate_in, up_in, down_in = (layer.removeprefix(f"{path}.") for layer in layers)
        return path, Gated(gate_in, up_in, down_in, activation_of(act), positional(self.traced.modules[path]), x)

    def _holds_only(self, path: str, nodes: list[Node]) -> bool:
        """Whether a module has exactly these operations, whose last one is used, and nobody watches inside it."""
        if not path or self.traced.inside[path] != len(nodes) or not nodes[-1].users:
            return False
        return all(self.traced.is_free(inner) for inner in self.traced.within(path))

    def primitive_norms(self) -> dict[str, PrimitiveNorm]:
        """Modules that are a root mean square norm and nothing else, in single operations: a square, a mean, a root and
        products."""
        nodes: dict[str, list[Node]] = defaultdict(list)
        for node in self.traced.operations:
            nodes[(stack(node) or [""])[-1]].append(node)
        norms = {}
        for path, inside in nodes.items():
            if path and self.traced.inside[path] == len(inside) and self.traced.is_free(path):
                norm = self._primitive_norm(path, [n for n in inside if n.target not in (*COPIES, *CHECKS)])
                norms.update({} if norm is None else {path: norm})
        return norms

    def _primitive_norm(self, path: str, nodes: list[Node]) -> PrimitiveNorm | None:
        inputs = self._arguments_of(path)
        if len(nodes) not in (5, 6) or len(inputs) != 1:
            return None
        ((name, value),) = inputs.items()
        x, epsilon = origin(nodes[0].args[0]), _epsilon(nodes, width_axis=len(value.shape) - 1)
        if epsilon is None or not self._is_computed(x):
            return None
        if any(node.meta["val"].dtype != torch.float32 for node in (x, *nodes)) or x.meta["val"].shape != value.shape:
            return None
        scale = "" if len(nodes) == 5 else self._scale(path, nodes[5], nodes[4], value.shape[-1])
        if scale is None:
            return None
        return PrimitiveNorm("rms_norm", positional(self.traced.modules[path]), name, scale, epsilon)

    def _scale(self, path: str, product: Node, normed: Node, width: int) -> str | None:
        """The path, inside a module, of the parameter (width) that a product multiplies a norm's output by."""
        factors = [factor for factor in _factors(product) if factor is not normed]
        scale = self.traced.parameter(factors[0]) if len(factors) == 1 else ""
        if not scale.startswith(f"{path}.") or tuple(factors[0].meta["val"].shape) != (width,):
            return None
        return scale.removeprefix(f"{path}.")

    def _is_computed(self, node: Any) -> bool:
        """Whether a node is computed or an input of the model, not stored in it."""
        return isinstance(node, Node) and (node.op != "placeholder" or node.name in self.traced.from_outside)

    def _is_like(self, residual: Any, linear: Node) -> bool:
        """Whether a summand has the shape and type of the layer's output, and is not stored in the model."""
        if not self._is_computed(residual):
            return False
        value, output = residual.meta["val"], linear.meta["val"]
        return value.shape == output.shape and value.dtype == output.dtype == torch.float32

    def _norm(self, norm: Node, linear: Node, path: str) -> dict[str, Any]:
        """The fields of LinearAddNorm for a norm over the last dimension whose parameters are in the module; {} for any
        other norm."""
        has = arguments(norm)
        nodes = {name: has[of] for name, of in (("scale", "weight"), ("shift", "bias")) if has.get(of) is not None}
        inner = {name: self.traced.parameter(node).removeprefix(f"{path}.") for name, node in nodes.items()}
        if any(f"{path}.{inner[name]}" != self.traced.parameter(node) for name, node in nodes.items()):
            return {}
        if list(has["normalized_shape"]) != [linear.meta["val"].shape[-1]]:
            return {}
        return {"norm": NORMS[norm.target], "epsilon": epsilon_of(norm), **inner}

    def _inputs(self, path: str, linear: Node, residual: Any) -> tuple[str | None, str | None]:
        """The names of the arguments of a module that its layer reads and that is added, if it has no others."""
        inputs, read = self._arguments_of(path), [*self._arguments_of(self.traced.path(linear)).values()]
        if len(read) != 1 or not all(isinstance(value, torch.Tensor) for value in inputs.values()):
            return None, None
        x = next((name for name, value in inputs.items() if value is read[0]), None)
        others = [name for name in inputs if name != x]
        if residual is None or residual is linear.args[0]:
            return (None if others else x), (None if residual is None else x)
        return (x, others[0]) if len(others) == 1 else (None, None)

    def _arguments_of(self, path: str) -> dict[str, Any]:
        """The arguments of a module that returns one tensor, by name."""
        call = self.traced.calls.get(path)
        return call.inputs if call is not None and isinstance(call.output, torch.Tensor) else {}


def _epsilon(nodes: Sequence[Node], *, width_axis: int) -> float | None:
    """The epsilon of x * rsqrt(mean(x^2, -1) + epsilon), which the first five nodes compute in this order, and which a
    sixth may multiply; None where they compute something else."""
    square, mean, plus, root, product = nodes[:5]
    targets = [aten.mean.dim, aten.add.Tensor, aten.rsqrt.default, *[aten.mul.Tensor] * (len(nodes) - 4)]
    if [node.target for node in nodes[1:]] != targets or not _is_square(square):
        return None
    over, added = arguments(mean), arguments(plus)
    if list(over["dim"]) not in ([-1], [width_axis]) or not over["keepdim"] or added["alpha"] != 1:
        return None
    steps = [(mean, square), (plus, mean), (root, plus)]
    if any(origin(after.args[0]) is not before for after, before in steps):
        return None
    if _factors(product) != {origin(square.args[0]), root}:
        return None
    return added["other"] if isinstance(added["other"], float) else None


def _is_idle_dropout(node: Node | None) -> bool:
    """Whether a node is a dropout that changes nothing, outside of training."""
    return node is not None and node.target is aten.dropout.default and not arguments(node)["train"]


def _factors(product: Node) -> set[Any]:
    return {origin(factor) for factor in product.args[:2]}


def _is_square(node: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] == 2
    return node.target is aten.mul.Tensor and len(_factors(node)) == 1
