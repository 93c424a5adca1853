"""Lets blocks of a compiled decoder compute one token at a time in one go, where that gives what the blocks give."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.runtime.layers.fused import PrimitiveNorm
from secateur.runtime.program.find_chains import NoChainError
from secateur.runtime.program.find_decoder_steps import CACHE, DecoderBlock, DecoderSignature, decoder_blocks
from secateur.runtime.program.from_fx import Traced
from secateur.runtime.run.decoder_step import DecoderProgram, DecoderRunner, TokenInputs, use_decoders
from secateur.runtime.run.install_chain import TOLERANCE
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

BATCH, TOKENS = 2, 4
"""The size of the input that blocks are tried on."""


def step_blocks(model: nn.Module, traced: Traced, norms: Mapping[str, PrimitiveNorm]) -> tuple[int, str]:
    """Let blocks of a model with packed layers, traced before they were packed, compute one token at a time in one go.

    Returns how many do, and why the first of the others does not. The times are not measured: the kernels are those of
    the layers, and only the work of torch between them is left out.
    """
    blocks, refused = decoder_blocks(traced, norms)
    reasons = [f"{path} {reason}" for path, reason in refused.items()]
    programs: dict[str, DecoderProgram] = {}
    for block in blocks:
        try:
            programs[block.path] = _tried(model, block)
        except NoChainError as error:
            reasons.append(f"{block.path} {error}")
    use_decoders(model, programs)
    return len(programs), next(iter(reasons), "")


def _tried(model: nn.Module, block: DecoderBlock) -> DecoderProgram:
    """The program of a block.

    Raises:
        NoChainError: when it gives another output or leaves another cache than the block.
    """
    inside = len(block.path) + 1
    parts = ("weight", "bias", "scale", "shift")
    steps = tuple(
        replace(step, **{name: path[inside:] for name in parts if (path := getattr(step, name)) is not None})
        for step in block.steps
    )
    program = DecoderProgram(block.signature, steps, block.attention[inside:], block.width)
    module = model.get_submodule(block.path)
    try:
        runner = DecoderRunner(module, program)
        with torch.no_grad():
            pairs = _both(module, runner)
    except EXPECTED as error:
        raise NoChainError(f"cannot be tried with a cache ({in_a_line(error)})") from error
    for expected, got in pairs:
        if got.shape != expected.shape or not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
            raise NoChainError("gives another result one token at a time")
    return program


@dataclass(frozen=True)
class _Text:
    """Random tokens that a block is tried on.

    - `form`: how the block is called
    - `x`: (batch, tokens, width)
    - `mask`: (batch, 1, tokens, tokens)
    - `rotary`: cosines and sines (1, tokens, width of a head)
    """

    form: DecoderSignature
    x: torch.Tensor
    mask: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]

    def inputs(self, begin: int, end: int, cache: Any) -> TokenInputs:
        """The arguments that come with the tokens [begin, end)."""
        cos, sin = (angles[:, begin:end].contiguous() for angles in self.rotary)
        mask = self.mask[:, :, begin:end, :end] if self.form.mask else None
        return TokenInputs(mask, (cos, sin) if self.form.turns else None, cache)

    def output_of(self, block: nn.Module, begin: int, end: int, cache: Any) -> torch.Tensor:
        """The output of a block for the tokens [begin, end), which go into the cache."""
        form, inputs = self.form, self.inputs(begin, end, cache)
        arguments: dict[str, Any] = {form.mask: inputs.mask, form.turns: inputs.rotary}
        arguments.pop("", None)
        output = block(**{form.x: self.x[:, begin:end].contiguous(), CACHE: cache, **arguments})
        return output[0] if isinstance(output, tuple) else output


def _random_text(runner: DecoderRunner) -> _Text:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, runner.program.width, generator=generator)
    angles = torch.rand(1, TOKENS, runner.heads[2] // 2, generator=generator) * 3
    mask = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    mask[0, ..., 1:, 0] = False  # like padding on the left
    rotary = (torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1))
    return _Text(runner.program.form, x, mask, rotary)


def _both(block: nn.Module, runner: DecoderRunner) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (expected, got): the outputs of a block and of its program for a token after others, and the keys and
    values that they leave in the cache."""
    from transformers import DynamicCache  # optional

    text, last = _random_text(runner), TOKENS - 1
    expected_cache: Any = DynamicCache()
    text.output_of(block, 0, last, expected_cache)
    cache = copy.deepcopy(expected_cache)
    expected = text.output_of(block, last, TOKENS, expected_cache)
    got = runner.run(text.x[:, last:].contiguous(), text.inputs(last, TOKENS, cache), runner.prepare(BATCH))
    pairs = [(expected, got)]
    for layer, other in zip(expected_cache.layers, cache.layers, strict=True):
        if layer.is_initialized:
            pairs += [(layer.keys, other.keys), (layer.values, other.values)]
    return pairs
