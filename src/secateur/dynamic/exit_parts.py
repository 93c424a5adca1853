"""A model with an early exit as two modules, for runtimes in which nothing stops a graph: the blocks before the exit
with its head, and the rest, which goes on from their states.
"""

from typing import Any

import torch
from torch import nn

from secateur.dynamic.exits import EarlyExit
from secateur.errors import ModelError
from secateur.torch.base.manifest import submodule
from secateur.torch.blockwise.block_calls import replaced

STATES = "states"
"""The name of what the first part gives to the second: states of all tokens, (rows, tokens, features)."""


class FirstBlocks(nn.Module):
    """The blocks before an exit, and its head: inputs of the model -> its logits and the states for `Rest`.

    Later blocks hand on their states while it runs: nothing reads what the model computes then, so that a traced graph
    ends at the exit. (A trace bears no exception that ends a module.)
    """

    def __init__(self, model: nn.Module, leave: EarlyExit, *, in_tuples: bool) -> None:
        super().__init__()
        self.model, self.in_tuples = model, in_tuples
        self.paths = [f"{leave.stack}.{number}" for number in range(leave.block, leave.blocks)]
        self.config = getattr(model, "config", None)
        self.head = nn.Linear(leave.weight.shape[1], leave.weight.shape[0])
        self.head.load_state_dict({"weight": torch.from_numpy(leave.weight), "bias": torch.from_numpy(leave.bias)})

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The states are the first argument of the block after the exit."""
        seen: list[torch.Tensor] = []

        def hand_on(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(states)
            return (states,) if self.in_tuples else states

        later = [submodule(self.model, path) for path in self.paths]
        try:
            for block in later:
                vars(block)["forward"] = hand_on
            self.model(**inputs)
        finally:
            for block in later:
                vars(block).pop("forward", None)
        return {"logits": self.head(seen[0][:, 0]), STATES: seen[0]}


class Rest(nn.Module):
    """The blocks behind an exit: inputs of the model and the states of `FirstBlocks` -> the logits of the model.

    The model makes masks and tables again from its inputs. Blocks before the exit give the states without running.
    """

    def __init__(self, model: nn.Module, leave: EarlyExit, *, in_tuples: bool) -> None:
        super().__init__()
        self.model, self.paths = model, [f"{leave.stack}.{number}" for number in range(leave.block)]
        self.config = getattr(model, "config", None)
        self.in_tuples = in_tuples

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The logits alone."""
        states = inputs.pop(STATES)
        given = (states,) if self.in_tuples else states
        with replaced(self.model, dict.fromkeys(self.paths, given), []):
            return {"logits": self.model(**inputs).logits}


def parts_of(model: nn.Module, leave: EarlyExit, inputs: dict[str, torch.Tensor]) -> tuple[FirstBlocks, Rest]:
    """The two modules, which share the weights of the model; ModelError where they do not do what the model does.

    inputs: an example by the names of the model's inputs.
    """
    seen: list[bool] = []
    block = submodule(model, leave.path)
    handle = block.register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    try:
        with torch.no_grad():
            expected = model(**inputs).logits
            first = FirstBlocks(model, leave, in_tuples=seen[0])
            rest = Rest(model, leave, in_tuples=seen[0])
            got = rest(**inputs, states=first(**inputs)[STATES])["logits"]
    finally:
        handle.remove()
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
        raise ModelError(
            f"a {type(model).__name__} does not go on from the states after block {leave.block} alone, so its exit "
            "cannot be exported; run it in PyTorch, or use token pruning"
        )
    return first.eval(), rest.eval()
