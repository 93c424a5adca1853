"""Finds what the kernels can compute along with a linear layer, in the traced graph of a model: an activation, a gate,
or a residual and a norm after it; and norms that are written out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.runtime.layers.fused import Gated, LinearAddNorm, One, PrimitiveNorm
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
    positional,
    reader,
    stack,
)


@dataclass(frozen=True)
class Fusions:
    """What was found, by paths of modules.

    `activations`: linear layer -> (module of the activation, its name); the module runs once and holds no other
    operation, so that an nn.Identity can take its place. `calls`: module -> how it becomes one call of the kernels.
    """

    activations: dict[str, tuple[str, str]] = field(default_factory=dict)
    calls: dict[str, One] = field(default_factory=dict)


def fusions(traced: Traced) -> Fusions:
    """What can be fused into the linear layers of a traced model."""
    finder = _Finder(traced)
    activations = dict(filter(None, map(finder.activation, finder.linears)))
    calls: dict[str, One] = dict(filter(None, (finder.one_call(node, activations) for node in finder.linears)))
    calls |= dict(filter(None, map(finder.gated, traced.operations)))
    calls |= finder.written_norms()
    return Fusions(activations, calls)


class _Finder:
    """Looks around the linear layers of a traced model."""

    def __init__(self, traced: Traced):
        self.traced = traced
        linears = [node for node in traced.operations if node.target is aten.linear.default]
        self.linears = [n for n in linears if traced.parameter(n.args[1]) and traced.inside[traced.path(n)] == 1]

    def activation(self, linear: torch.fx.Node) -> tuple[str, tuple[str, str]] | None:
        """(layer, (module, name)) of the activation that alone reads a layer's output."""
        after = reader(linear)
        name = "" if after is None else activation_of(after)
        if after is None or not name:
            return None
        path = (stack(after) or [""])[-1]
        if not path or not self.traced.is_free(path) or self.traced.inside[path] != 1:
            return None
        return self.traced.path(linear), (path, name)

    def one_call(self, linear: torch.fx.Node, activations: Mapping[str, Any]) -> tuple[str, LinearAddNorm] | None:
        """(module, its call) for the innermost module that runs a linear layer, what follows it, and nothing else."""
        chain, residual, more = [linear], None, {}
        node = reader(linear)
        if node is not None and activation_of(node) and self.traced.path(linear) in activations:
            chain, node = [*chain, node], reader(node)
        if node is not None and node.target is aten.dropout.default and not arguments(node)["train"]:
            chain, node = [*chain, node], reader(node)
        if node is not None and node.target is aten.add.Tensor and arguments(node)["alpha"] == 1:
            residual = node.args[1] if node.args[0] is chain[-1] else node.args[0]
            if not self._is_like(residual, linear):
                return None
            chain, node = [*chain, node], reader(node)
        path = common(chain if node is None else [*chain, node])
        if node is not None and node.target in NORMS and self.traced.inside[path] == len(chain) + 1:
            chain, more = [*chain, node], self._norm(node, linear, path)
            if not more:
                return None
        path = common(chain)
        if not path or self.traced.inside[path] != len(chain) or len(chain[-1].users) == 0 or not (more or residual):
            return None
        if not all(self.traced.is_free(each) for each in self.traced.within(path)):
            return None
        x, added = self._bound(path, linear, residual)
        if x is None:
            return None
        names = positional(self.traced.modules[path])
        return path, LinearAddNorm(self.traced.path(linear).removeprefix(f"{path}."), names, x, added, **more)

    def gated(self, product: torch.fx.Node) -> tuple[str, Gated] | None:
        """(module, its call) for the innermost module of a product of two layers of one tensor, one of them activated,
        with the layer that reads it if the module holds that too, and nothing else.
        """
        if product.target is not aten.mul.Tensor:
            return None
        for act, up in (product.args[:2], reversed(product.args[:2])):
            gate = act.all_input_nodes[0] if isinstance(act, torch.fx.Node) and activation_of(act) else None
            if gate is None or gate not in self.linears or up not in self.linears or gate.args[0] is not up.args[0]:
                continue
            if any(reader(before) is not after for before, after in ((gate, act), (act, product), (up, product))):
                continue
            four = [gate, act, up, product]
            return self._gated(four, *self._down(product)) or self._gated(four, [], "")
        return None

    def _down(self, product: torch.fx.Node) -> tuple[list[torch.fx.Node], str]:
        """The layer that alone reads a product, with what is before it, and its path."""
        more, node = [], reader(product)
        if node is not None and node.target is aten.dropout.default and not arguments(node)["train"]:
            more, node = [node], reader(node)
        if node is None or node not in self.linears:
            return [], ""
        return [*more, node], self.traced.path(node)

    def _gated(self, four: list[torch.fx.Node], more: list[torch.fx.Node], down: str) -> tuple[str, Gated] | None:
        gate, act, up, _ = four
        nodes = [*four, *more]
        path = common(nodes)
        if not path or self.traced.inside[path] != len(nodes) or not nodes[-1].users:
            return None
        if not all(self.traced.is_free(each) for each in self.traced.within(path)):
            return None
        x, _ = self._bound(path, gate, None)
        if x is None:
            return None
        layers = (self.traced.path(gate), self.traced.path(up), down)
        gate_in, up_in, down_in = (each.removeprefix(f"{path}.") for each in layers)
        return path, Gated(gate_in, up_in, down_in, activation_of(act), positional(self.traced.modules[path]), x)

    def written_norms(self) -> dict[str, PrimitiveNorm]:
        """Modules that are nothing but a root mean square norm, written out: a square, a mean, a root and products."""
        nodes: dict[str, list[torch.fx.Node]] = defaultdict(list)
        for node in self.traced.operations:
            nodes[(stack(node) or [""])[-1]].append(node)
        found = {}
        for path, inside in nodes.items():
            if path and self.traced.inside[path] == len(inside) and self.traced.is_free(path):
                norm = self._written_norm(path, [n for n in inside if n.target not in (*COPIES, *CHECKS)])
                found.update({} if norm is None else {path: norm})
        return found

    def _written_norm(self, path: str, nodes: list[torch.fx.Node]) -> PrimitiveNorm | None:
        given = self._given(path)
        if len(nodes) not in (5, 6) or len(given) != 1:
            return None
        (name, value), (square, mean, plus, root, *products) = *given.items(), nodes
        x = origin(square.args[0])
        kinds = [aten.mean.dim, aten.add.Tensor, aten.rsqrt.default, *[aten.mul.Tensor] * len(products)]
        if [node.target for node in nodes[1:]] != kinds or not _is_square(square):
            return None
        over, added = arguments(mean), arguments(plus)
        if list(over["dim"]) not in ([-1], [len(value.shape) - 1]) or not over["keepdim"] or added["alpha"] != 1:
            return None
        steps = [(mean, square), (plus, mean), (root, plus)]
        if any(origin(after.args[0]) is not before for after, before in steps) or _pair(products[0]) != {x, root}:
            return None
        if not isinstance(added["other"], float) or not self._is_outer(x):
            return None
        if any(node.meta["val"].dtype != torch.float32 for node in (x, *nodes)) or x.meta["val"].shape != value.shape:
            return None
        scale = ""
        if len(products) == 2:
            others = [node for node in _pair(products[1]) if node is not products[0]]
            scale = self.traced.parameter(others[0]) if len(others) == 1 else ""
            if not scale.startswith(f"{path}.") or tuple(others[0].meta["val"].shape) != (value.shape[-1],):
                return None
        names = positional(self.traced.modules[path])
        return PrimitiveNorm("rms_norm", names, name, scale.removeprefix(f"{path}."), added["other"])

    def _is_outer(self, node: Any) -> bool:
        """Whether a node is computed or given, not stored."""
        return isinstance(node, torch.fx.Node) and (node.op != "placeholder" or node.name in self.traced.from_outside)

    def _is_like(self, residual: Any, linear: torch.fx.Node) -> bool:
        """Whether a summand has the shape and type of the layer's output and is computed or given, not stored."""
        if not self._is_outer(residual):
            return False
        value, output = residual.meta["val"], linear.meta["val"]
        return value.shape == output.shape and value.dtype == output.dtype == torch.float32

    def _norm(self, norm: torch.fx.Node, linear: torch.fx.Node, path: str) -> dict[str, Any]:
        """What LinearAddNorm wants to know about a norm over the last dimension whose parameters lie in the module."""
        has = arguments(norm)
        given = {name: has[of] for name, of in (("scale", "weight"), ("shift", "bias")) if has.get(of) is not None}
        inner = {name: self.traced.parameter(node).removeprefix(f"{path}.") for name, node in given.items()}
        if any(f"{path}.{inner[name]}" != self.traced.parameter(node) for name, node in given.items()):
            return {}
        if list(has["normalized_shape"]) != [linear.meta["val"].shape[-1]]:
            return {}
        return {"norm": NORMS[norm.target], "epsilon": epsilon_of(norm), **inner}

    def _bound(self, path: str, linear: torch.fx.Node, residual: Any) -> tuple[str | None, str | None]:
        """The arguments of a module that its layer reads and that is added, if they are all it is given."""
        given, read = self._given(path), [*self._given(self.traced.path(linear)).values()]
        if len(read) != 1 or not all(isinstance(value, torch.Tensor) for value in given.values()):
            return None, None
        x = next((name for name, value in given.items() if value is read[0]), None)
        others = [name for name in given if name != x]
        if residual is None or residual is linear.args[0]:
            return (None if others else x), (None if residual is None else x)
        return (x, others[0]) if len(others) == 1 else (None, None)

    def _given(self, path: str) -> dict[str, Any]:
        """The arguments of a module that gives one tensor, by name."""
        call = self.traced.calls.get(path)
        return call.given if call is not None and isinstance(call.output, torch.Tensor) else {}


def origin(node: Any) -> Any:
    """What a node is a copy of, in the same type."""
    while isinstance(node, torch.fx.Node) and node.target in COPIES:
        before = node.all_input_nodes[0]
        if before.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = before
    return node


def _pair(product: torch.fx.Node) -> set[Any]:
    return {origin(factor) for factor in product.args[:2]}


def _is_square(node: torch.fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] == 2
    return node.target is aten.mul.Tensor and len(_pair(node)) == 1
