"""Installs chains in a compiled model. The weights of a chain that was found in the trace are packed again for one
tile; the chain is compared with the layers that it replaces, timed against them on request, and kept if it is right and
faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.kernels.format import describe
from secateur.kernels.packing import unpack
from secateur.kernels.steps import NONE, Op, pack_together
from secateur.runtime.layers.linear import SparseLinear
from secateur.runtime.layers.tuning import interleaved
from secateur.runtime.program.find_chains import (
    BlockSignature,
    ChainBlock,
    NoChainError,
    find_blocks,
    refuse_other_types,
)
from secateur.runtime.program.from_fx import Traced, stack
from secateur.runtime.run.chain import Chain, ChainProgram, leaves, use_chains
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

TOLERANCE = 1e-4
"""Largest difference to the layers, relative to their largest output: float32 sums in another order."""


@dataclass
class ChainOutcome:
    """What became of the blocks of a model.

    - `blocks`: how many run in chains
    - `reason`: why the first of the others does not (its path and a sentence), or ''
    - `packed_bytes`: the sizes of weights that were packed again, by the paths of their layers
    """

    blocks: int = 0
    reason: str = ""
    packed_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class _ExampleCall:
    """What happens to a run of blocks when the model runs on the example.

    - `inputs`: the arguments of the first block, by name
    - `output`: the stream that the last block returns
    - `shown`: how often this stream stands in the output of the holder
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    shown: int = 0


def chain_blocks(
    model: nn.Module, traced: Traced, example: Mapping[str, Any] | tuple[Any, ...], tokens: int, *, measure: bool
) -> ChainOutcome:
    """Let blocks of a model with packed layers, traced before they were packed, run as chains where they can.

    With `measure`, a chain is kept only if it is faster than its layers at `tokens` tokens.
    """
    blocks, refused = find_blocks(traced)
    reasons = [f"{path} {reason}" for path, reason in refused.items()]
    outcome, fitting = ChainOutcome(), []
    for block in blocks:
        reason = _unfit(model, block)
        if reason:
            reasons.append(f"{block.path} {reason}")
        else:
            fitting.append(block)
    runs = list(_runs(fitting))
    programs: dict[str, list[ChainProgram]] = {}
    for run, call in zip(runs, _run_example(model, traced, runs, example), strict=True):
        holder = _holder(traced, run[0].path)
        try:
            program, new = _tried(model, holder, run, call, tokens=tokens, measure=measure)
        except NoChainError as error:
            reasons.append(f"{run[0].path} {error}")
            continue
        for path, tensor in new.items():
            _put(model, path, tensor)
            if path.endswith(".packed"):
                outcome.packed_bytes[path.removesuffix(".packed")] = tensor.nbytes
        programs.setdefault(holder, []).append(program)
        outcome.blocks += len(run)
    for path, chains in programs.items():
        use_chains(model.get_submodule(path), chains)
    outcome.reason = next(iter(reasons), "")
    return outcome


def _holder(traced: Traced, block: str) -> str:
    """The path of the module that goes through the list of a block."""
    parent = block.rpartition(".")[0]
    return parent.rpartition(".")[0] if isinstance(traced.modules[parent], nn.ModuleList) else parent


def _unfit(model: nn.Module, block: ChainBlock) -> str:
    """Why the layers of a block cannot be steps of a chain, or ''."""
    for step in block.steps:
        if step.weight is None:
            continue
        layer = model.get_submodule(step.weight.rpartition(".")[0])
        if not isinstance(layer, SparseLinear):
            return "holds layers that stay dense, or have more than one form"
        info = describe(layer.packed.numpy())
        if info.format != "tiled":
            return f"holds layers in the {info.format} format, which chains do not take"
        if step.weight in block.folds and info.value != "float32":
            return f"multiplies what a layer of {info.value} gives"
    return ""


def _runs(blocks: Sequence[ChainBlock]) -> Iterator[list[ChainBlock]]:
    """Groups of blocks, each of which reads the output of the one before it."""
    run: list[ChainBlock] = []
    for block in blocks:
        if run and not _follows(run[-1], block):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _follows(before: ChainBlock, block: ChainBlock) -> bool:
    """Whether a block of the same list and signature is the only reader of the one before it."""
    parents = [path.rpartition(".")[0] for path in (before.path, block.path)]
    if block.source is not before.exit or parents[0] != parents[1]:
        return False
    if block.signature != before.signature or block.mask is not before.mask or block.heads != before.heads:
        return False
    return all(block.path in stack(user) for user in before.exit.users)


def _run_example(
    model: nn.Module, traced: Traced, runs: Sequence[list[ChainBlock]], example: Mapping[str, Any] | tuple[Any, ...]
) -> list[_ExampleCall]:
    """Run the model on the example and record what happens to runs of blocks."""
    calls = [_ExampleCall() for _ in runs]
    handles = []
    for call, run in zip(calls, runs, strict=True):
        first, last = (model.get_submodule(block.path) for block in (run[0], run[-1]))
        holder = model.get_submodule(_holder(traced, run[0].path))
        handles.append(first.register_forward_pre_hook(_record_inputs(call, run[0].signature), with_kwargs=True))
        handles.append(last.register_forward_hook(_record_output(call)))
        handles.append(holder.register_forward_hook(_count_shown(call)))
    try:
        if runs:
            with torch.no_grad():
                example = copy.copy(example)
                model(**example) if isinstance(example, Mapping) else model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _record_inputs(call: _ExampleCall, signature: BlockSignature) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.inputs = {**dict(zip(signature.names, args, strict=False)), **kwargs}

    return hook


def _record_output(call: _ExampleCall) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call.output = output[0] if isinstance(output, tuple) else output

    return hook


def _count_shown(call: _ExampleCall) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call.shown = sum(leaf is call.output for leaf in leaves(output))

    return hook


def _tried(
    model: nn.Module, holder: str, run: list[ChainBlock], call: _ExampleCall, *, tokens: int, measure: bool
) -> tuple[ChainProgram, dict[str, torch.Tensor]]:
    """The program of a run of blocks, and the new tensors that it needs in the model, by path.

    Raises:
        NoChainError: when the chain is wrong, or no faster than the blocks.
    """
    signature = _with_constants_of(run[0].signature, call.inputs)
    x = call.inputs[signature.x]
    program = ChainProgram(
        tuple(_inside(holder, block.path) for block in run),
        signature,
        tuple(_joined(run, holder)),
        run[0].heads,
        width=x.shape[-1],
        rows=run[-1].exit.meta["val"].shape[-1],
        without_mask=not signature.mask,
        shown=call.shown,
    )
    new = _packed(model, run)
    old = {path: _put(model, path, tensor) for path, tensor in new.items()}
    chain = Chain(model.get_submodule(holder), program)
    parts = chain.tensors()
    for path, tensor in old.items():
        _put(model, path, tensor)
    trial = _Trial(chain, parts, call.inputs)
    dtype = None if run[0].mask is None else run[0].mask.meta["val"].dtype
    with torch.no_grad():
        program = replace(program, without_mask=trial.agrees(x, dtype))
        if measure and not trial.is_faster(x, tokens, None if program.without_mask else dtype):
            raise NoChainError("measured no faster as a chain")
    return program, new


def _with_constants_of(signature: BlockSignature, inputs: Mapping[str, Any]) -> BlockSignature:
    """The signature with the constants of a call outside of the trace, which sets some of them itself."""
    tensors = (signature.x, *signature.tensors)
    constants = {name: value for name, value in inputs.items() if name not in (*tensors, signature.mask)}
    if not all(isinstance(inputs.get(name), torch.Tensor) for name in tensors):
        raise NoChainError("is called otherwise than in the trace")
    refuse_other_types(constants)
    return replace(signature, constants=constants)


class _Trial:
    """A chain with the tensors that are packed for it, against its blocks one by one, called as on the example."""

    def __init__(self, chain: Chain, parts: list[torch.Tensor], inputs: dict[str, Any]):
        self.chain, self.parts, self.inputs = chain, parts, inputs

    def at_once(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The output of the last block for the input of the first, as one call."""
        return self.chain.call(x, mask, self.parts)

    def one_by_one(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The output of the last block for the input of the first, block by block."""
        signature = self.chain.program.form
        masks = {signature.mask: mask} if signature.mask else {}
        for block in self.chain.blocks:
            output = block(**{**self.inputs, signature.x: x, **masks})
            x = output[0] if isinstance(output, tuple) else output
        return x

    def agrees(self, x: torch.Tensor, dtype: torch.dtype | None) -> bool:
        """Whether the blocks treat a call without a mask as one that sees all tokens.

        Raises:
            NoChainError: when chain and blocks differ on x and a mask of that type (None: blocks without a mask).
        """
        mask = None if dtype is None else _mask(x, dtype)
        try:
            expected = self.one_by_one(x, mask)
        except EXPECTED as error:
            raise NoChainError(f"fails with another mask ({in_a_line(error)})") from error
        if not _equal(self.at_once(x, mask), expected):
            raise NoChainError("gives another result as a chain")
        try:
            return dtype is None or _equal(self.at_once(x, None), self.one_by_one(x, None))
        except EXPECTED:
            return False

    def is_faster(self, x: torch.Tensor, tokens: int, dtype: torch.dtype | None) -> bool:
        """Whether the chain takes less time for about so many tokens, in texts of the length of x."""
        length = min(tokens, x.shape[1])
        texts = torch.randn(max(1, tokens // length), length, x.shape[2])
        mask = None if dtype is None else _mask(texts, dtype)
        one_by_one, at_once = interleaved([partial(f, texts, mask) for f in (self.one_by_one, self.at_once)])
        return at_once < one_by_one


def _mask(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (batch, 1, 1, tokens) that hides some tokens at the end of each text but the last."""
    keep = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
    keep[: max(1, len(keep) - 1), ..., x.shape[1] - x.shape[1] // 3 :] = False
    added = torch.zeros_like(keep, dtype=dtype)
    return keep if dtype == torch.bool else added.masked_fill(~keep, torch.finfo(dtype).min)


def _equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _joined(run: Sequence[ChainBlock], holder: str) -> Iterator[Op]:
    """The steps of all blocks in one list; each block reads the last value of the block before it."""
    before = 0
    for block in run:
        for step in block.steps:
            parts: dict[str, Any] = {
                name: None if getattr(step, name) is None else _inside(holder, getattr(step, name))
                for name in ("weight", "bias", "scale", "shift")
            }
            yield replace(step, reads=[value if value == NONE else value + before for value in step.reads], **parts)
        before += len(block.steps)


def _inside(holder: str, path: str) -> str:
    return path.removeprefix(f"{holder}.") if holder else path


def _packed(model: nn.Module, run: Sequence[ChainBlock]) -> dict[str, torch.Tensor]:
    """The new tensors of a run of blocks by path: weights that are packed together, with parameters that their outputs
    were multiplied by folded into them."""
    new: dict[str, torch.Tensor] = {}
    folds = {weight: scale for block in run for weight, scale in block.folds.items()}
    paths = [step.weight for block in run for step in block.steps if step.weight is not None]
    weights, values = [], []
    for path in paths:
        layer: Any = model.get_submodule(path.rpartition(".")[0])
        weight, value = unpack(layer.packed.numpy()), describe(layer.packed.numpy()).value
        if path in folds:
            scale = model.get_parameter(folds[path]).detach()
            weight = weight * scale.numpy()[:, None]
            if layer.bias is not None:
                new[path.removesuffix("packed") + "bias"] = layer.bias * scale
            new[folds[path]] = nn.Parameter(torch.ones_like(scale), requires_grad=False)
        weights.append(weight)
        values.append(value)
    blobs = map(torch.from_numpy, pack_together(weights, values))
    return {**new, **dict(zip(paths, blobs, strict=True))}


def _put(model: nn.Module, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """Set a parameter or buffer; returns the old one."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    before = getattr(module, name)
    setattr(module, name, tensor)
    return before
