"""Finds what the kernels can compute along with a linear layer, in the traced graph of a model: an activation,
or a residual and a norm after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.runtime.onecall import OneCall
from secateur.runtime.traced import (
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
    calls: dict[str, OneCall] = field(default_factory=dict)


def fusions(traced: Traced) -> Fusions:
    """What can be fused into the linear layers of a traced model."""
    finder = _Finder(traced)
    activations = dict(filter(None, map(finder.activation, finder.linears)))
    calls = dict(filter(None, (finder.one_call(node, activations) for node in finder.linears)))
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

    def one_call(self, linear: torch.fx.Node, activations: Mapping[str, Any]) -> tuple[str, OneCall] | None:
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
        return path, OneCall(self.traced.path(linear).removeprefix(f"{path}."), names, x, added, **more)

    def _is_like(self, residual: Any, linear: torch.fx.Node) -> bool:
        """Whether a summand has the shape and type of the layer's output and is computed or given, not stored."""
        if not isinstance(residual, torch.fx.Node) or (
            residual.op == "placeholder" and residual.name not in self.traced.from_outside
        ):
            return False
        value, output = residual.meta["val"], linear.meta["val"]
        return value.shape == output.shape and value.dtype == output.dtype == torch.float32

    def _norm(self, norm: torch.fx.Node, linear: torch.fx.Node, path: str) -> dict[str, Any]:
        """What OneCall wants to know about a norm over the last dimension whose parameters lie in the module."""
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
