"""The dense model as it was recorded block by block: the outputs of all blocks, and the gradient of a score at them.

A walk forward keeps the outputs. Then the rest of the model runs on the last of them, and a walk backward takes the
gradient through one block after the other, so that no more than one block is in memory. Both stay on disk: a block can
be run again with its input and with the gradient of its output at any time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from secateur.torch.base.batches import run
from secateur.torch.blockwise.block_calls import BlockCall, next_call, replaced
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.output_error import first_tensor
from secateur.torch.stats.curvature import Score, scored

OUTPUT, GRADIENT = "dense", "gradient"
"""Streams of states: what a block returns, and the gradient at the first tensor of it."""
NO_TENSOR = "a block of the model returns no tensor, so no gradient can be taken through it"
Over = Callable[[Any], AbstractContextManager[None]]
"""A context in which passes on a batch are watched."""


class Recorded:
    """The walk through the one chain of blocks of a model, whose parameters take no gradient.

    paths: of the blocks. batches: keyword arguments of the model. states: of outputs and gradients.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], batches: Sequence[Mapping[str, Any]], states: States
    ) -> None:
        self.model, self.paths, self.batches, self.states = model, paths, batches, states

    def has(self, stream: str, block: int) -> bool:
        """Whether the states of a block are there."""
        return self.states.has(stream, block, len(self.batches))

    def call(self, block: int, batch: int, *, with_gradient: bool = False) -> tuple[BlockCall, torch.Tensor | None]:
        """The call of a block for a batch, and the output of the block before it, from which the call is computed.

        with_gradient: whether that output takes a gradient.
        """
        earlier, before = {}, None
        if block:
            value = self.states.get(OUTPUT, block - 1, batch)
            before = first_tensor(value, NO_TENSOR).requires_grad_(with_gradient)
            earlier = dict.fromkeys(self.paths[:block], value)
        with torch.set_grad_enabled(with_gradient):
            return next_call(self.model, self.batches[batch], earlier, [self.paths[block]]), before

    @torch.no_grad()
    def forward(self, block: int) -> None:
        """Run all batches through a block, and keep its outputs."""
        module = self.model.get_submodule(self.paths[block])
        for batch in range(len(self.batches)):
            call, _ = self.call(block, batch)
            self.states.put(OUTPUT, block, batch, call.run(module))

    def score(self, score: Score, seed: int) -> None:
        """Keep the gradient of the score at the output of the last block.

        seed: the draws of a batch are those of `secateur.torch.stats.curvature.collect_curvature`.

        Raises DataError for a score that is not a finite number.
        """
        last = len(self.paths) - 1
        for number, batch in enumerate(self.batches):
            value = self.states.get(OUTPUT, last, number)
            leaf = first_tensor(value, NO_TENSOR).requires_grad_()
            with torch.enable_grad(), replaced(self.model, dict.fromkeys(self.paths, value), ()):
                scored(score, run(self.model, batch), batch, seed, number).backward()
            self.states.put(GRADIENT, last, number, _gradient(leaf))

    def backward(
        self,
        block: int,
        over: Over = lambda batch: nullcontext(),
        after: Callable[[Any], None] = lambda batch: None,
        *,
        keep: bool = True,
    ) -> None:
        """Take the gradient through a block, for all batches.

        over: a context around the passes of a batch. after: called once they are done.
        keep: whether the gradient at the output of the block before is kept.
        """
        module = self.model.get_submodule(self.paths[block])
        for number, batch in enumerate(self.batches):
            call, before = self.call(block, number, with_gradient=True)
            with over(batch), torch.enable_grad():
                output = first_tensor(call.run(module), NO_TENSOR)
                if output.requires_grad:
                    output.backward(self.states.get(GRADIENT, block, number))
            after(batch)
            if keep and before is not None:
                self.states.put(GRADIENT, block - 1, number, _gradient(before))


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient that has arrived at a tensor."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
