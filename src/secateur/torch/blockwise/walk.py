"""The walk through the blocks of a model: the call of the next block, its pruning, and the states that it leaves."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.layout import Layout
from secateur.recipe import Recipe, Reconstruction, find_method
from secateur.select import parse_pattern
from secateur.torch.blockwise.block_calls import BlockCall, chains, next_call
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.output_error import first_tensor
from secateur.torch.blockwise.prune_block import Pruned, counted, grams_of, prune_weights
from secateur.torch.blockwise.reconstruct import NO_TENSOR, reconstruct


@dataclass(frozen=True)
class Done:
    """A block that is pruned.

    path: of its module.
    number, total: its number in the order of pruning, from 1, and how many blocks there are.
    seconds: how long it took.
    error: mean over its weights of the relative error of their outputs; None where no text is read.
    layers: its weights.
    tuned: relative error of its output before and after reconstruction; None where the recipe asks for none.
    """

    path: str
    number: int
    total: int
    seconds: float
    error: float | None
    layers: tuple[Pruned, ...]
    tuned: tuple[float, float] | None = None


class Run:
    """The walk through the blocks of one model. For each block, call `next_block`, `prune`, `advance` and `close`.

    batches: keyword arguments of the model that run through the blocks; empty where nobody reads them (`Recipe.walks`).
    states: the outputs of blocks.
    low_precision: whether blocks are tuned with products in bfloat16, where the recipe does not say it.

    finished: paths of the finished blocks, in order.
    shares: sparsity of weights that have another one than the recipe says.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        batches: Sequence[Mapping[str, Any]],
        recipe: Recipe,
        states: States,
        *,
        low_precision: bool = False,
    ) -> None:
        self.low_precision = low_precision
        self.model, self.layout, self.batches, self.recipe, self.states = model, layout, batches, recipe, states
        self.chains = chains(layout)
        self.total = sum(len(paths) for paths in self.chains.values())
        self.finished: list[str] = []
        self.dense = recipe.reconstruct is not None
        self.shares: Mapping[str, float] = {}
        self.method, self.pattern = find_method(recipe.criterion), parse_pattern(recipe.pattern)

    @property
    def streams(self) -> list[str]:
        """The streams whose states are kept: of the pruned model, and of the dense model where it is a target."""
        return ["dense", "pruned"] if self.dense else ["pruned"]

    @property
    def ready(self) -> list[str]:
        """The blocks that may come next: the first unfinished block of each chain."""
        unfinished = [paths for paths in self.chains.values() if paths[-1] not in self.finished]
        return [next(path for path in paths if path not in self.finished) for paths in unfinished]

    def next_block(self) -> str:
        """The block that the model reaches next."""
        return self.call("pruned", 0).path if self.batches else self.ready[0]

    def call(self, stream: str, batch: int) -> BlockCall:
        """The call of the next block for a batch."""
        recorded: dict[str, Any] = {}
        for paths in self.chains.values():
            done = [p for p in paths if p in self.finished]
            if done:
                value = self.states.get(stream, self.finished.index(done[-1]), batch)
                recorded.update(dict.fromkeys(done, value))
        with torch.no_grad():
            return next_call(self.model, self.batches[batch], recorded, self.ready)

    def calls(self, stream: str) -> Iterator[BlockCall]:
        """The calls of the next block for all batches."""
        return (self.call(stream, batch) for batch in range(len(self.batches)))

    @torch.no_grad()
    def advance(self, stream: str, block: nn.Module) -> None:
        """Run all batches through a block, and keep its outputs as the states of this step."""
        for batch, call in enumerate(self.calls(stream)):
            self.states.put(stream, len(self.finished), batch, call.run(block))

    def prune(self, path: str, stored: Callable[[str], torch.dtype]) -> Done:
        """Prune the next block in place, and keep its dense states where they are a target.

        stored: weight -> the type of its file, to which it is rounded.
        """
        start = time.perf_counter()
        block = self.model.get_submodule(path)
        weights = counted(self.layout, self.model, path)
        if self.dense:
            self.advance("dense", block)
        grams = grams_of(block, weights, self.layout, self.calls("pruned")) if self.batches else {}
        layers = prune_weights(
            weights,
            self.layout,
            grams,
            method=self.method,
            pattern=self.pattern,
            sparsity=lambda name: self.shares.get(name, self.recipe.sparsity),
            options=self.recipe.options,
            stored=stored,
        )
        del grams
        tuning = self.recipe.reconstruct
        tuned = self._reconstruct(block, weights, stored, tuning) if tuning else None
        errors = [layer.error for layer in layers if layer.error is not None]
        error = sum(errors) / max(len(errors), 1) if self.batches else None
        number = len(self.finished) + 1
        return Done(path, number, self.total, time.perf_counter() - start, error, tuple(layers), tuned)

    def _reconstruct(
        self,
        block: nn.Module,
        weights: Mapping[str, nn.Module],
        stored: Callable[[str], torch.dtype],
        options: Reconstruction,
    ) -> tuple[float, float]:
        """Tune the weights of the next block; returns the error of its output before and after."""
        step = len(self.finished)

        def target(batch: int) -> torch.Tensor:
            return first_tensor(self.states.get("dense", step, batch), NO_TENSOR)

        parameters = {name: module.weight for name, module in weights.items()}
        errors = reconstruct(
            block,
            parameters,
            len(self.batches),
            lambda batch: self.call("pruned", batch),
            target,
            passes=options.passes,
            rate=options.rate,
            low_precision=self.low_precision if options.bfloat16 is None else options.bfloat16,
            seed=self.recipe.seed + step,
        )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(parameter.to(stored(name)).to(parameter.dtype))
        return errors

    def stale(self, path: str) -> list[tuple[str, int]]:
        """States (stream, step) that nobody reads after the next block, `path`: those of the block before it."""
        chain = next(paths for paths in self.chains.values() if path in paths)
        before = [step for step, done in enumerate(self.finished) if done in chain]
        return [(stream, before[-1]) for stream in self.streams] if before and self.batches else []

    def close(self, path: str) -> None:
        """Finish a block: drop the states of the block before it."""
        for stream, step in self.stale(path):
            self.states.drop(stream, step)
        self.finished.append(path)
