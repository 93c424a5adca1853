"""Finds what the kernels can compute along with a linear layer, in the traced graph of a model: an activation,
or a residual and a norm after it."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.runtime.onecall import OneCall

aten = torch.ops.aten
_ACTIVATIONS = {aten.relu.default: "relu", aten.gelu.default: "gelu", aten.silu.default: "silu"}
_NORMS = {aten.layer_norm.default: "layer_norm", aten.rms_norm.default: "rms_norm"}


@dataclass(frozen=True)
class Fusions:
    """What was found, by paths of modules.

    `activations`: linear layer -> (module of the activation, its name); the module runs once and holds no other
    operation, so that an nn.Identity can take its place. `calls`: module -> how it becomes one call of the kernels.
    """

    activations: dict[str, tuple[str, str]] = field(default_factory=dict)
    calls: dict[str, OneCall] = field(default_factory=dict)


def fusions(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]) -> Fusions:
    """What can be fused into the linear layers of a model that is called as on the example.

    Raises:
        ModelError: when the model cannot be traced on the example.
    """
    from secateur.torch.export import export

    # Hooks that were there before are the reason not to fuse, so they are looked for before those of the tracing.
    watched = {path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    with _recorded(model) as inputs:
        program = export(model, example)
    graph = _Graph(model, program, inputs, watched)
    activations = dict(filter(None, map(graph.activation, graph.linears)))
    calls = dict(filter(None, (graph.one_call(node, activations) for node in graph.linears)))
    return Fusions(activations, calls)


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """The arguments, by name, of each module's last call: none where they have no names, or where it gave no tensor."""
    inputs: dict[str, dict[str, Any]] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                names = list(inspect.signature(module.forward).parameters)
            except (TypeError, ValueError):
                names = []
            known = isinstance(output, torch.Tensor) and len(args) <= len(names) and {*kwargs} <= {*names}
            inputs[path] = {**dict(zip(names, args, strict=False)), **kwargs} if known else {}

        return hook

    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(record(path), with_kwargs=True).remove)
        yield inputs


class _Graph:
    """A traced model: which module each operation belongs to, and which module each weight."""

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        inputs: dict[str, dict[str, Any]],
        watched: Collection[str],
    ):
        signature = program.graph_signature
        self.inputs, self.watched = inputs, watched
        self.parameters = signature.inputs_to_parameters
        self.from_outside = {*signature.user_inputs}
        self.operations = [node for node in program.graph.nodes if node.op == "call_function"]
        self.inside = Counter(path for node in self.operations for path in _stack(node))
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.holders = Counter(id(module) for module in self.modules.values())
        linears = [node for node in self.operations if node.target is aten.linear.default]
        self.linears = [node for node in linears if self.parameter(node.args[1]) and self.inside[self.path(node)] == 1]

    def parameter(self, node: Any) -> str:
        """The path of the parameter that a node stands for, or ''."""
        return self.parameters.get(getattr(node, "name", ""), "")

    def path(self, linear: torch.fx.Node) -> str:
        """The module that holds the weight of a linear layer."""
        return self.parameter(linear.args[1]).rpartition(".")[0]

    def is_free(self, path: str) -> bool:
        """Whether the module stands in one place and nobody watches it."""
        module = self.modules.get(path)
        return module is not None and path not in self.watched and self.holders[id(module)] == 1

    def activation(self, linear: torch.fx.Node) -> tuple[str, tuple[str, str]] | None:
        """(layer, (module, name)) of the activation that alone reads a layer's output."""
        after = _reader(linear)
        if after is None or after.target not in _ACTIVATIONS:
            return None
        name = _ACTIVATIONS[after.target]
        if name == "gelu" and _arguments(after)["approximate"] == "tanh":
            name = "gelu_tanh"
        path = (_stack(after) or [""])[-1]
        if not path or not self.is_free(path) or self.inside[path] != 1:
            return None
        return self.path(linear), (path, name)

    def one_call(self, linear: torch.fx.Node, activations: Mapping[str, Any]) -> tuple[str, OneCall] | None:
        """(module, its call) for the innermost module that runs a linear layer, what follows it, and nothing else."""
        chain, residual, more = [linear], None, {}
        node = _reader(linear)
        if node is not None and node.target in _ACTIVATIONS and self.path(linear) in activations:
            chain, node = [*chain, node], _reader(node)
        if node is not None and node.target is aten.dropout.default and not _arguments(node)["train"]:
            chain, node = [*chain, node], _reader(node)
        if node is not None and node.target is aten.add.Tensor and _arguments(node)["alpha"] == 1:
            residual = node.args[1] if node.args[0] is chain[-1] else node.args[0]
            if not self._is_like(residual, linear):
                return None
            chain, node = [*chain, node], _reader(node)
        path = _common(chain if node is None else [*chain, node])
        if node is not None and node.target in _NORMS and self.inside[path] == len(chain) + 1:
            chain, more = [*chain, node], self._norm(node, linear, path)
            if not more:
                return None
        path = _common(chain)
        if not path or self.inside[path] != len(chain) or len(chain[-1].users) == 0 or not (more or residual):
            return None
        if not all(self.is_free(each) for each in self.modules if each == path or each.startswith(f"{path}.")):
            return None
        x, added = self._bound(path, linear, residual)
        if x is None:
            return None
        names = tuple(inspect.signature(self.modules[path].forward).parameters)
        return path, OneCall(self.path(linear).removeprefix(f"{path}."), names, x, added, **more)

    def _is_like(self, residual: Any, linear: torch.fx.Node) -> bool:
        """Whether a summand has the shape and type of the layer's output and is computed or given, not stored."""
        if not isinstance(residual, torch.fx.Node) or (
            residual.op == "placeholder" and residual.name not in self.from_outside
        ):
            return False
        value, output = residual.meta["val"], linear.meta["val"]
        return value.shape == output.shape and value.dtype == output.dtype == torch.float32

    def _norm(self, norm: torch.fx.Node, linear: torch.fx.Node, path: str) -> dict[str, Any]:
        """What OneCall wants to know about a norm over the last dimension whose parameters lie in the module."""
        has = _arguments(norm)
        given = {name: has[of] for name, of in (("scale", "weight"), ("shift", "bias")) if has.get(of) is not None}
        inner = {name: self.parameter(node).removeprefix(f"{path}.") for name, node in given.items()}
        if any(f"{path}.{inner[name]}" != self.parameter(node) for name, node in given.items()):
            return {}
        if list(has["normalized_shape"]) != [linear.meta["val"].shape[-1]]:
            return {}
        epsilon = torch.finfo(torch.float32).eps if has["eps"] is None else has["eps"]
        return {"norm": _NORMS[norm.target], "epsilon": float(epsilon), **inner}

    def _bound(self, path: str, linear: torch.fx.Node, residual: Any) -> tuple[str | None, str | None]:
        """The arguments of a module that its layer reads and that is added, if they are all it is given."""
        given, read = self.inputs.get(path, {}), [*self.inputs.get(self.path(linear), {}).values()]
        if len(read) != 1 or not all(isinstance(value, torch.Tensor) for value in given.values()):
            return None, None
        x = next((name for name, value in given.items() if value is read[0]), None)
        others = [name for name in given if name != x]
        if residual is None or residual is linear.args[0]:
            return (None if others else x), (None if residual is None else x)
        return (x, others[0]) if len(others) == 1 else (None, None)


def _stack(node: torch.fx.Node) -> list[str]:
    """Paths of the modules that a node was traced in, the innermost last."""
    return [path.removeprefix("L['self']").lstrip(".") for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _common(nodes: list[torch.fx.Node]) -> str:
    """The innermost module that holds all nodes."""
    stacks = [_stack(node) for node in nodes]
    return next((path for path in reversed(stacks[0]) if all(path in stack for stack in stacks)), "")


def _reader(node: torch.fx.Node) -> torch.fx.Node | None:
    """The only operation that reads a node's output."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with their defaults."""
    names = [(argument.name, argument.default_value) for argument in node.target._schema.arguments]
    given = {name: value for (name, _), value in zip(names, node.args, strict=False)}
    return {**dict(names), **given, **node.kwargs}
