"""Puts chains into a compiled model: what was found in the trace is packed anew for one tile, compared with the layers
that it stands for, timed against them on request, and kept where it is right and faster.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.kernels.packing import describe, unpack
from secateur.kernels.steps import NONE, Op, pack_together
from secateur.runtime.layers.linear import SparseLinear
from secateur.runtime.layers.tuning import interleaved
from secateur.runtime.program.find_chains import BlockSignature, ChainBlock, NoChainError, blocks, refuse_strange
from secateur.runtime.program.from_fx import Traced, stack
from secateur.runtime.run.chain import Chain, ChainProgram, leaves, use_chains
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

TOLERANCE = 1e-4
"""Largest difference to the layers, of their largest output: float32 sums in another order."""


@dataclass
class ChainOutcome:
    """How many blocks run in chains, why others do not (a sentence, or ''), and the sizes of weights packed anew."""

    blocks: int = 0
    apart: str = ""
    packed: dict[str, int] = field(default_factory=dict)


@dataclass
class _Seen:
    """What a run of blocks was called with on the example, by name, and how often what it gave stands in what its
    holder gave."""

    given: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    shown: int = 0


def chain_blocks(
    model: nn.Module, traced: Traced, example: Mapping[str, Any] | tuple[Any, ...], tokens: int, measure: bool
) -> ChainOutcome:
    """Let blocks of a model with packed layers, traced before they were packed, run as chains where they can."""
    found, refused = blocks(traced)
    outcome = ChainOutcome(apart=next((f"{path} {reason}" for path, reason in refused.items()), ""))
    packed = []
    for block in found:
        reason = _unfit(model, block)
        packed += [] if reason else [block]
        outcome.apart = outcome.apart or (f"{block.path} {reason}" if reason else "")
    runs = list(_runs(packed))
    plans: dict[str, list[ChainProgram]] = {}
    for run, seen in zip(runs, _observed(model, traced, runs, example), strict=True):
        try:
            plan = _tried(model, traced, run, seen, tokens, measure, outcome)
        except NoChainError as reason:
            outcome.apart = outcome.apart or f"{run[0].path} {reason}"
            continue
        plans.setdefault(_holder(traced, run[0].path), []).append(plan)
        outcome.blocks += len(run)
    for path, chains in plans.items():
        use_chains(model.get_submodule(path), chains)
    return outcome


def _holder(traced: Traced, block: str) -> str:
    """The module that goes through the list that a block stands in."""
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


def _runs(found: Sequence[ChainBlock]) -> Iterator[list[ChainBlock]]:
    """Blocks that read one another and nothing else."""
    run: list[ChainBlock] = []
    for block in found:
        if run and not _follows(run[-1], block):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _follows(before: ChainBlock, block: ChainBlock) -> bool:
    parents = [path.rpartition(".")[0] for path in (before.path, block.path)]
    if block.source is not before.exit or parents[0] != parents[1]:
        return False
    if block.form != before.form or block.mask is not before.mask or block.heads != before.heads:
        return False
    return all(block.path in stack(user) for user in before.exit.users)


def _observed(
    model: nn.Module, traced: Traced, runs: Sequence[list[ChainBlock]], example: Mapping[str, Any] | tuple[Any, ...]
) -> list[_Seen]:
    """What happens to runs of blocks when the model runs on the example."""
    seen = [_Seen() for _ in runs]
    handles = []

    def enter(one: _Seen, block: ChainBlock) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            one.given = {**dict(zip(block.form.names, args, strict=False)), **kwargs}

        return hook

    def leave(one: _Seen) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            one.output = output[0] if isinstance(output, tuple) else output

        return hook

    def close(one: _Seen) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            one.shown = sum(leaf is one.output for leaf in leaves(output))

        return hook

    for one, run in zip(seen, runs, strict=True):
        first, last = (model.get_submodule(block.path) for block in (run[0], run[-1]))
        handles.append(first.register_forward_pre_hook(enter(one, run[0]), with_kwargs=True))
        handles.append(last.register_forward_hook(leave(one)))
        handles.append(model.get_submodule(_holder(traced, run[0].path)).register_forward_hook(close(one)))
    try:
        if runs:
            with torch.no_grad():
                example = copy.copy(example)
                model(**example) if isinstance(example, Mapping) else model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tried(
    model: nn.Module,
    traced: Traced,
    run: list[ChainBlock],
    seen: _Seen,
    tokens: int,
    measure: bool,
    outcome: ChainOutcome,
) -> ChainProgram:
    """The plan of a run that is right and fast, with its weights packed for it; NoChainError where it is not."""
    holder = _holder(traced, run[0].path)
    form = _called(run[0].form, seen.given)
    x = seen.given[form.x]
    rows = run[-1].exit.meta["val"].shape[-1]
    plan = ChainProgram(
        tuple(_inside(holder, block.path) for block in run),
        form,
        tuple(_joined(run, holder)),
        run[0].heads,
        x.shape[-1],
        rows,
        not form.mask,
        seen.shown,
    )
    new = _packed(model, run)
    old = {path: _put(model, path, tensor) for path, tensor in new.items()}
    chain = Chain(model.get_submodule(holder), plan)
    parts = chain.tensors()
    for path, tensor in old.items():
        _put(model, path, tensor)
    trial = _Trial(chain, parts, seen.given)
    dtype = None if run[0].mask is None else run[0].mask.meta["val"].dtype
    with torch.no_grad():
        plan = replace(plan, without_mask=trial.agrees(x, dtype))
        if measure and not trial.is_faster(x, tokens, None if plan.without_mask else dtype):
            raise NoChainError("measured no faster as a chain")
    for path, tensor in new.items():
        _put(model, path, tensor)
    outcome.packed |= {
        path.removesuffix(".packed"): tensor.nbytes for path, tensor in new.items() if path.endswith(".packed")
    }
    return plan


def _called(form: BlockSignature, given: Mapping[str, Any]) -> BlockSignature:
    """The form with the constants of a call outside of the trace, which sets some of them itself."""
    rest = {name: value for name, value in given.items() if name not in (form.x, form.mask, *form.tensors)}
    tensors = [given.get(name) for name in (form.x, *form.tensors)]
    if not all(isinstance(value, torch.Tensor) for value in tensors):
        raise NoChainError("is called otherwise than in the trace")
    refuse_strange(rest)
    return replace(form, constants=rest)


class _Trial:
    """A chain with the parts that are packed for it, against its blocks one by one, called as on the example."""

    def __init__(self, chain: Chain, parts: list[torch.Tensor], given: dict[str, Any]):
        self.chain, self.parts, self.given = chain, parts, given

    def at_once(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The output of the last block for the input of the first."""
        return self.chain.call(x, mask, self.parts)

    def one_by_one(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The same, block by block."""
        form = self.chain.plan.form
        masks = {form.mask: mask} if form.mask else {}
        for block in self.chain.blocks:
            output = block(**{**self.given, form.x: x, **masks})
            x = output[0] if isinstance(output, tuple) else output
        return x

    def agrees(self, x: torch.Tensor, mask: torch.dtype | None) -> bool:
        """Whether the blocks take a call without a mask for one that sees all tokens.

        Raises:
            NoChainError: when the two differ on x and a mask of that type (None: blocks without one).
        """
        made_up = None if mask is None else _mask(x, mask)
        try:
            expected = self.one_by_one(x, made_up)
        except EXPECTED as error:
            raise NoChainError(f"fails with another mask ({in_a_line(error)})") from error
        if not _equal(self.at_once(x, made_up), expected):
            raise NoChainError("gives another result as a chain")
        try:
            return mask is None or _equal(self.at_once(x, None), self.one_by_one(x, None))
        except EXPECTED:
            return False

    def is_faster(self, x: torch.Tensor, tokens: int, mask: torch.dtype | None) -> bool:
        """Whether the chain takes less time for about so many tokens, in texts as long as those of x."""
        length = min(tokens, x.shape[1])
        made_up = torch.randn(max(1, tokens // length), length, x.shape[2])
        seen = None if mask is None else _mask(made_up, mask)
        one_by_one, at_once = interleaved([partial(f, made_up, seen) for f in (self.one_by_one, self.at_once)])
        return at_once < one_by_one


def _mask(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask (batch, 1, 1, tokens) that hides some tokens at the end of each text but the last."""
    seen = torch.ones(x.shape[0], 1, 1, x.shape[1], dtype=torch.bool)
    seen[: max(1, len(seen) - 1), ..., x.shape[1] - x.shape[1] // 3 :] = False
    added = torch.zeros_like(seen, dtype=dtype)
    return seen if dtype == torch.bool else added.masked_fill(~seen, torch.finfo(dtype).min)


def _equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _joined(run: Sequence[ChainBlock], holder: str) -> Iterator[Op]:
    """The steps of all blocks, each of which reads the last value of the one before it."""
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
    """New tensors by path: weights packed together, and what outputs are multiplied by taken into them."""
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
    """Set a parameter or buffer; returns what was there."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    before = getattr(module, name)
    setattr(module, name, tensor)
    return before
