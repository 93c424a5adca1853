"""A model traced on an example: its operations, the module that each belongs to, and what modules are called with."""

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

aten = torch.ops.aten
ACTIVATIONS = {aten.relu.default: "relu", aten.gelu.default: "gelu", aten.silu.default: "silu"}
COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
)
CHECKS = (aten._assert_tensor_metadata.default,)
NORMS = {aten.layer_norm.default: "layer_norm", aten.rms_norm.default: "rms_norm"}


@dataclass(frozen=True)
class ModuleCall:
    """A module's last call in the trace: its arguments by name, what it gave, and how many calls there were."""

    given: dict[str, Any]
    output: Any
    times: int


@dataclass
class _Seen:
    """What is seen while a model is traced: calls by the paths of modules (None where arguments have no names), and the
    masks that attention is given."""

    calls: dict[str, ModuleCall | None] = field(default_factory=dict)
    masks: list[torch.Tensor] = field(default_factory=list)


class Traced:
    """A model as traced on an example, in which no module or weight is replaced yet.

    Raises:
        ModelError: when the model cannot be traced on the example.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]):
        from secateur.torch.trace.export import export

        # Hooks that were there before are the reason not to fuse, so they are looked for before those of the tracing.
        self.watched = {path for path, m in model.named_modules() if is_watched(m)}
        with _watching(model) as seen:
            program = export(model, example)
        signature = program.graph_signature
        self.calls, self.masks = seen.calls, seen.masks
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
        """Whether the module stands in one place and nobody watches it."""
        module = self.modules.get(path)
        return module is not None and path not in self.watched and self.holders[id(module)] == 1

    def within(self, path: str) -> list[str]:
        """The paths of a module and of all that it holds."""
        return [each for each in self.modules if each == path or each.startswith(f"{path}.")]


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            names = positional(module)
            known = len(args) <= len(names) and not {*kwargs} & {*names[: len(args)]}
            before = seen.calls.get(path)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            seen.calls[path] = ModuleCall(given, output, 1 + (before.times if before else 0)) if known else None

        return hook

    with contextlib.ExitStack() as on_exit:
        for path, module in model.named_modules():
            on_exit.callback(module.register_forward_hook(record(path), with_kwargs=True).remove)
        with _Masks(seen.masks):
            yield seen


class _Masks(TorchFunctionMode):
    """Notes the masks that scaled_dot_product_attention is given."""

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
    return next((path for path in reversed(stacks[0]) if all(path in other for other in stacks)), "")


def reader(node: torch.fx.Node) -> torch.fx.Node | None:
    """The only operation that reads a node's output."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with their defaults."""
    names = [(argument.name, argument.default_value) for argument in node.target._schema.arguments]
    given = {name: value for (name, _), value in zip(names, node.args, strict=False)}
    return {**dict(names), **given, **node.kwargs}


def activation_of(node: torch.fx.Node) -> str:
    """The kernels' name of the activation that an operation is, or ''."""
    name = ACTIVATIONS.get(node.target, "")
    return "gelu_tanh" if name == "gelu" and arguments(node)["approximate"] == "tanh" else name


def epsilon_of(norm: torch.fx.Node) -> float:
    """What a norm adds to the variance."""
    epsilon = arguments(norm)["eps"]
    return float(torch.finfo(torch.float32).eps if epsilon is None else epsilon)
