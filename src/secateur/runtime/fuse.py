"""Finds activations that can be computed inside the linear layer before them, in the traced graph of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_ACTIVATIONS = {
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.gelu.default: "gelu",
    torch.ops.aten.silu.default: "silu",
}


def fusable(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]) -> dict[str, tuple[str, str]]:
    """For each linear layer whose output only an activation reads: (path of the activation's module, its name).

    The activation has to be the only operation of a module that runs once, so that an nn.Identity can take its place.

    Raises:
        ModelError: when the model cannot be traced on the example.
    """
    from secateur.torch.export import export

    program = export(model, example)
    parameters = program.graph_signature.inputs_to_parameters
    operations = [node for node in program.graph.nodes if node.op == "call_function"]
    inside = Counter(path for node in operations for path in _stack(node))
    modules = dict(model.named_modules(remove_duplicate=False))
    holders = Counter(id(module) for module in modules.values())
    found = {}
    for node in operations:
        if node.target is not torch.ops.aten.linear.default or len(node.users) != 1:
            continue
        after = next(iter(node.users))
        weight = parameters.get(getattr(node.args[1], "name", ""))
        name = _ACTIVATIONS.get(after.target)
        if weight is None or name is None:
            continue
        if name == "gelu" and after.kwargs.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        linear, act = weight.rpartition(".")[0], (_stack(after) or [""])[-1]
        module = modules.get(act)
        if module is None or not act or inside[act] != 1 or inside[linear] != 1 or holders[id(module)] != 1:
            continue
        if not (module._forward_hooks or module._forward_pre_hooks):
            found[linear] = (act, name)
    return found


def _stack(node: torch.fx.Node) -> list[str]:
    """Paths of the modules that a node was traced in, the innermost last."""
    return [path.removeprefix("L['self']").lstrip(".") for path, _ in node.meta.get("nn_module_stack", {}).values()]
