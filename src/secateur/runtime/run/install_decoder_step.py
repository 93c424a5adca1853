"""Lets blocks of a compiled decoder take a token at a time in one go, where that gives what the blocks give."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.runtime.layers.fused import PrimitiveNorm
from secateur.runtime.program.find_chains import NoChainError
from secateur.runtime.program.find_decoder_steps import CACHE, DecoderBlock, decoder_blocks
from secateur.runtime.program.from_fx import Traced
from secateur.runtime.run.decoder_step import DecoderProgram, DecoderRunner, TokenInputs, use_decoders
from secateur.runtime.run.install_chain import TOLERANCE
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

BATCH, TOKENS = 2, 4
"""Of what blocks are tried on."""


def step_blocks(model: nn.Module, traced: Traced, norms: Mapping[str, PrimitiveNorm]) -> tuple[int, str]:
    """Let blocks of a model with packed layers, traced before they were packed, take a token at a time in one go; how
    many do, and why the first of the others does not.

    Which is faster is not measured: the kernels are the same, and only what torch does between them is left out.
    """
    found, refused = decoder_blocks(traced, norms)
    apart = next((f"{path} {reason}" for path, reason in refused.items()), "")
    plans: dict[str, DecoderProgram] = {}
    for block in found:
        try:
            plans[block.path] = _tried(model, block)
        except NoChainError as reason:
            apart = apart or f"{block.path} {reason}"
    use_decoders(model, plans)
    return len(plans), apart


def _tried(model: nn.Module, block: DecoderBlock) -> DecoderProgram:
    """The plan of a block that gives the same output and cache; NoChainError where it does not."""
    inside = len(block.path) + 1
    parts = ("weight", "bias", "scale", "shift")
    steps = tuple(
        replace(step, **{name: path[inside:] for name in parts if (path := getattr(step, name)) is not None})
        for step in block.steps
    )
    plan = DecoderProgram(block.form, steps, block.attention[inside:], block.width)
    module = model.get_submodule(block.path)
    try:
        program = DecoderRunner(module, plan)
        with torch.no_grad():
            pairs = list(_both(module, program))
    except EXPECTED as error:
        raise NoChainError(f"cannot be tried with a cache ({in_a_line(error)})") from error
    for expected, got in pairs:
        if got.shape != expected.shape or not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
            raise NoChainError("gives another result one token at a time")
    return plan


def _both(block: nn.Module, program: DecoderRunner) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a block and its program give for a token after others, and the keys and values that they leave."""
    from transformers import DynamicCache

    form, width = program.plan.form, program.heads[2]
    made = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TOKENS, program.plan.width, generator=made)
    angles = torch.rand(1, TOKENS, width // 2, generator=made) * 3
    turns = tuple(torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    seen = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[0, ..., 1:, 0] = False  # as padding on the left is

    def inputs(first: int, end: int) -> TokenInputs:
        cut = tuple(turn[:, first:end].contiguous() for turn in turns) if form.turns else None
        return TokenInputs(seen[:, :, first:end, :end] if form.mask else None, cut, cache)

    def called(first: int, end: int) -> torch.Tensor:
        given = inputs(first, end)
        more: dict[str, Any] = {form.mask: given.mask} if form.mask else {}
        more |= {form.turns: given.turns} if form.turns else {}
        output = block(**{form.x: x[:, first:end].contiguous(), CACHE: given.cache, **more})
        return output[0] if isinstance(output, tuple) else output

    cache: Any = DynamicCache()
    called(0, TOKENS - 1)
    before = copy.deepcopy(cache)
    expected = called(TOKENS - 1, TOKENS)
    after, cache = cache, before
    prepared = program.prepared(BATCH)
    assert prepared is not None
    got = program.run(x[:, -1:].contiguous(), inputs(TOKENS - 1, TOKENS), prepared)
    pairs = [(expected, got)]
    for one, other in zip(after.layers, cache.layers, strict=True):
        if one.is_initialized:
            pairs += [(one.keys, other.keys), (one.values, other.values)]
    return pairs
