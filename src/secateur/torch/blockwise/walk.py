"""The walk through the blocks of a model: what the next block is called with, its turn, the states that it leaves."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.recipe import Recipe, find_method
from secateur.select import parse_pattern
from secateur.torch.blockwise.block_calls import chains, next_call
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.prune_block import Call, Pruned, counted, grams_of, prune_weights
from secateur.torch.blockwise.reconstruct import reconstruct
from secateur.torch.shrink.masking import first_of


@dataclass(frozen=True)
class Done:
    """A block that is finished. error: mean over its weights of the relative error of their outputs, None where no
    text is read. tuned: relative error of the block's output before and after reconstruction, where that was asked for.
    """

    path: str
    number: int
    total: int
    seconds: float
    error: float | None
    layers: tuple[Pruned, ...]
    tuned: tuple[float, float] | None = None


class Run:
    """The walk through the blocks of one model. For each block: `next_block`, `prune`, `advance`, `close`.

    batches: what runs through the blocks, none where nothing that is done to them looks at it (`Recipe.walks`).
    low_precision: whether blocks are tuned with products in bfloat16, where the recipe leaves it open.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        batches: Sequence[Mapping[str, Any]],
        recipe: Recipe,
        states: States,
        low_precision: bool = False,
    ) -> None:
        self.low_precision = low_precision
        self.model, self.layout, self.batches, self.recipe, self.states = model, layout, batches, recipe, states
        self.chains = chains(layout)
        self.total = sum(len(paths) for paths in self.chains.values())
        self.finished: list[str] = []
        self.dense = recipe.reconstruct is not None
        self.shares: Mapping[str, float] = {}
        """Sparsity of weights that lose another share than the recipe says."""
        self.method, self.pattern = find_method(recipe.criterion), parse_pattern(recipe.pattern)

    @property
    def streams(self) -> list[str]:
        """The states that are kept: of the pruned model, and of the dense one where it is a target."""
        return ["dense", "pruned"] if self.dense else ["pruned"]

    @property
    def ready(self) -> list[str]:
        """The blocks that may come next: the first unfinished one of each chain."""
        return [
            next(p for p in c if p not in self.finished) for c in self.chains.values() if c[-1] not in self.finished
        ]

    def next_block(self) -> str:
        """The block that the model reaches next."""
        return self.call("pruned", 0).path if self.batches else self.ready[0]

    def call(self, stream: str, batch: int) -> Any:
        """What the next block is called with for a batch."""
        recorded: dict[str, Any] = {}
        for paths in self.chains.values():
            done = [p for p in paths if p in self.finished]
            if done:
                value = self.states.get(stream, self.finished.index(done[-1]), batch)
                recorded.update(dict.fromkeys(done, value))
        with torch.no_grad():
            return next_call(self.model, self.batches[batch], recorded, self.ready)

    def calls(self, stream: str) -> Iterator[Call]:
        """The calls of the next block for all batches."""
        for batch in range(len(self.batches)):
            found = self.call(stream, batch)
            yield found.args, found.kwargs

    @torch.no_grad()
    def advance(self, stream: str, block: nn.Module) -> None:
        """Run all batches through a block, and keep what it returns as the states of this step."""
        for batch, (args, kwargs) in enumerate(self.calls(stream)):
            self.states.put(stream, len(self.finished), batch, block(*args, **kwargs))

    def prune(self, path: str, stored: Callable[[str], torch.dtype]) -> Done:
        """Prune the next block in place; its dense states are kept where they are a target."""
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
            self.method,
            self.pattern,
            lambda name: self.shares.get(name, self.recipe.sparsity),
            self.recipe.options,
            stored,
        )
        del grams
        tuned = self._reconstruct(block, weights, stored) if self.recipe.reconstruct else None
        errors = [layer.error for layer in layers if layer.error is not None]
        error = sum(errors) / max(len(errors), 1) if self.batches else None
        number = len(self.finished) + 1
        return Done(path, number, self.total, time.perf_counter() - start, error, tuple(layers), tuned)

    def _reconstruct(self, block: nn.Module, weights: Mapping[str, nn.Module], stored: Any) -> tuple[float, float]:
        options = self.recipe.reconstruct
        assert options is not None
        step = len(self.finished)

        def call(batch: int) -> Call:
            found = self.call("pruned", batch)
            return found.args, found.kwargs

        def target(batch: int) -> torch.Tensor:
            found = first_of(self.states.get("dense", step, batch))
            if found is None:
                raise ModelError("a block returns no tensor, so it has no output to be tuned to")
            return found

        parameters = {name: module.weight for name, module in weights.items()}
        errors = reconstruct(
            block,
            parameters,
            len(self.batches),
            call,
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
        """States (stream, step) that nobody reads once the next block, `path`, is done: of the one before it."""
        chain = next(paths for paths in self.chains.values() if path in paths)
        before = [step for step, done in enumerate(self.finished) if done in chain]
        return [(stream, before[-1]) for stream in self.streams] if before and self.batches else []

    def close(self, path: str) -> None:
        """The block is done: its states replace those of the block before it."""
        for stream, step in self.stale(path):
            self.states.drop(stream, step)
        self.finished.append(path)
