"""A model traced on an example: its operations, the module of each operation, and the arguments of each module."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.runtime.layers.hooks import is_watched
from secateur.torch.trace.export import export

aten = torch.ops.aten
_ACTIVATIONS = {aten.relu.default: "relu", aten.gelu.default: "gelu", aten.silu.default: "silu"}
COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
)
"""Operations that copy or cast a tensor."""
CHECKS = (aten._assert_tensor_metadata.default,)
"""Operations that compute nothing."""
NORMS = {aten.layer_norm.default: "layer_norm", aten.rms_norm.default: "rms_norm"}
"""Operations that are norms, with the kernels' names."""


@dataclass(frozen=True)
class ModuleCall:
    """The last call of a module in the trace.

    - `inputs`: the arguments by name
    - `output`: what the module returned
    - `times`: how many calls there were
    """

    inputs: dict[str, Any]
    output: Any
    times: int


@dataclass
class _Record:
    """What happens while a model is traced.

    - `calls`: the calls of modules by path; None where arguments have no names
    - `masks`: the masks that attention is called with
    """

    calls: dict[str, ModuleCall | None] = field(default_factory=dict)
    masks: list[torch.Tensor] = field(default_factory=list)


class Traced:
    """A model as traced on an example, in which no module or weight is replaced yet.

    - `watched`: paths of modules that had hooks before the trace
    - `calls`, `masks`: see `_Record`
    - `parameters`: names of input nodes -> paths of the parameters that they stand for
    - `from_outside`: names of the nodes that are inputs of the model
    - `operations`: the nodes of the graph that compute something
    - `inside`: how many operations each module has, by path
    - `modules`: the modules by path
    - `holders`: in how many places each module (its id) stands

    Raises:
        ModelError: when the model cannot be traced on the example.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]):
        # Hooks that exist before the trace prevent fusion, so they are listed before the trace adds its own.
        self.watched = {path for path, m in model.named_modules() if is_watched(m)}
        with _recording(model) as record:
            program = export(model, example)
        signature = program.graph_signature
        self.calls, self.masks = record.calls, record.masks
        self.parameters = signature.inputs_to_parameters
        self.from_outside = {*signature.user_inputs}
        self.operations = [node for node in program.graph.nodes if node.op == "call_function"]
        self.inside = Counter(path for node in self.operations for path in stack(node))
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.holders = Counter(id(module) for module in self.modules.values())

    def parameter(self, node: Any) -> str:
        """The path of the parameter that a node stands for, or ''."""
        return self.parameters.get(getattr(node, "name", ""), "")

    def path(self, linear: torch.fx.Node) -> str:
        """The module that holds the weight of a linear layer."""
        return self.parameter(linear.args[1]).rpartition(".")[0]

    def is_free(self, path: str) -> bool:
        """Whether the module stands in one place and is not watched."""
        module = self.modules.get(path)
        return module is not None and path not in self.watched and self.holders[id(module)] == 1

    def within(self, path: str) -> list[str]:
        """The paths of a module and of all modules in it."""
        return [inner for inner in self.modules if inner == path or inner.startswith(f"{path}.")]


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[_Record]:
    record = _Record()

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            names = positional(module)
            has_names = len(args) <= len(names) and not {*kwargs} & {*names[: len(args)]}
            before = record.calls.get(path)
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            times = 1 + (before.times if before else 0)
            record.calls[path] = ModuleCall(inputs, output, times) if has_names else None

        return hook

    with contextlib.ExitStack() as on_exit:
        for path, module in model.named_modules():
            on_exit.callback(module.register_forward_hook(hook_for(path), with_kwargs=True).remove)
        with _MaskRecorder(record.masks):
            yield record


class _MaskRecorder(TorchFunctionMode):
    """Appends the masks that scaled_dot_product_attention is called with to a list."""

    def __init__(self, masks: list[torch.Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            if mask is not None:
                self.masks.append(mask)
        return func(*args, **(kwargs or {}))


def positional(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a module's forward takes by position."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def stack(node: torch.fx.Node) -> list[str]:
    """Paths of the modules that a node was traced in, the innermost last."""
    return [path.removeprefix("L['self']").lstrip(".") for path, _ in node.meta.get("nn_module_stack", {}).values()]


def common(nodes: list[torch.fx.Node]) -> str:
    """The innermost module that holds all nodes."""
    stacks = [stack(node) for node in nodes]
    return next((path for path in reversed(stacks[0]) if all(path in paths for paths in stacks)), "")


def only_reader(node: torch.fx.Node) -> torch.fx.Node | None:
    """The only operation that reads a node's output; None where several do, or none does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with their defaults."""
    names = [(argument.name, argument.default_value) for argument in node.target._schema.arguments]
    by_position = {name: value for (name, _), value in zip(names, node.args, strict=False)}
    return {**dict(names), **by_position, **node.kwargs}


def activation_of(node: torch.fx.Node) -> str:
    """The kernels' name of an operation that is an activation; '' for other operations."""
    name = _ACTIVATIONS.get(node.target, "")
    return "gelu_tanh" if name == "gelu" and arguments(node)["approximate"] == "tanh" else name


def epsilon_of(norm: torch.fx.Node) -> float:
    """The number that a norm adds to the variance."""
    epsilon = arguments(norm)["eps"]
    return float(torch.finfo(torch.float32).eps if epsilon is None else epsilon)


def origin(node: Any) -> Any:
    """The node that a node is a copy of, in the same type."""
    while isinstance(node, torch.fx.Node) and node.target in COPIES:
        before = node.all_input_nodes[0]
        if before.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = before
    return node
