"""Blocks of a model that follow one another run as one call of the kernels, where they are called as they were traced.

The module that goes through the blocks (their holder) opens a run; its first block computes the whole chain, and the
others give on what they are given. What comes otherwise than in the trace (training, gradients, hooks, other arguments,
another order, a stream that somebody keeps) runs layer by layer, if need be by calling the holder's own forward anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from secateur.kernels.steps import Op, step_from_json, table
from secateur.runtime.layers.hooks import is_watched
from secateur.runtime.layers.operators import run, sparse_chain
from secateur.runtime.program.find_chains import BlockSignature
from secateur.torch.stats.attention_scores import KNOWN


@dataclass(frozen=True)
class ChainProgram:
    """What a chain is: paths of its blocks and of the tensors in its steps, inside the holder; `width` and `rows` are
    the numbers a token that it reads and gives. `without_mask` tells whether attention sees all keys where there is no
    mask, `shown` how often the chain's output stands in what the holder gives.
    """

    blocks: tuple[str, ...]
    form: BlockSignature
    steps: tuple[Op, ...]
    heads: int
    width: int
    rows: int
    without_mask: bool
    shown: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChainProgram:
        """A plan from what `dataclasses.asdict` made of it.

        Raises:
            TypeError, KeyError, AttributeError: when it is none.
        """
        form: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data["form"].items()}
        steps = tuple(map(step_from_json, data["steps"]))
        return cls(**{**data, "blocks": tuple(data["blocks"]), "form": BlockSignature(**form), "steps": steps})


class Chain:
    """A plan on the modules of a holder.

    Raises:
        AttributeError: when the holder does not hold what the plan names.
    """

    def __init__(self, holder: nn.Module, plan: ChainProgram):
        self.plan = plan
        self.blocks = [holder.get_submodule(path) for path in plan.blocks]
        self.parts: list[tuple[nn.Module, str]] = []
        self.inside = children(self.blocks)

        def place(path: str) -> tuple[int, int]:
            parent, _, name = path.rpartition(".")
            self.parts.append((holder.get_submodule(parent), name))
            return len(self.parts) - 1, getattr(*self.parts[-1]).nbytes

        steps, numbers = table(plan.steps, place)
        self.steps, self.numbers = torch.from_numpy(steps), torch.from_numpy(numbers)
        form = plan.form
        optional = {
            name for name, value in form.constants.items() if value is None or (value is False and name in KNOWN)
        }
        self.needed = {form.x, *form.tensors, *form.constants} - optional

    def tensors(self) -> list[torch.Tensor]:
        """The parts of the steps as they are now."""
        if torch.compiler.is_compiling():
            return [getattr(module, name) for module, name in self.parts]
        # Attributes of modules take their time: a tenth of a millisecond for six blocks.
        return [(m._buffers if name in m._buffers else m._parameters)[name] for m, name in self.parts]

    def call(self, x: torch.Tensor, mask: torch.Tensor | None, parts: list[torch.Tensor]) -> torch.Tensor:
        """The output of the last block for the input of the first."""
        return run(sparse_chain, x, mask, parts, self.steps, self.numbers, self.plan.heads, self.plan.rows)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The stream and the mask in the arguments of a block; None where these are not those of the trace."""
        form = self.plan.form
        given = {**dict(zip(form.names, args, strict=False)), **kwargs}
        if len(given) != len(args) + len(kwargs) or not given.keys() >= self.needed:
            return None
        for name, value in given.items():
            if name in (form.x, form.mask):
                continue
            if name in form.tensors:
                known = isinstance(value, torch.Tensor)
            elif name in form.constants:
                known = type(value) is type(form.constants[name]) and value == form.constants[name]
            else:
                known = value is None or (value is False and name in KNOWN)
            if not known:
                return None
        return given[form.x], given.get(form.mask)

    def fits(self, x: Any, mask: Any) -> bool:
        """Whether the kernels know such a stream and mask."""
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if x.shape[2] != self.plan.width:
            return False
        if mask is None:
            return self.plan.without_mask
        if not self.plan.form.mask or not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return False
        if mask.dtype not in (torch.float32, torch.bool) or mask.device.type != "cpu" or mask.requires_grad:
            return False
        batch, heads, queries, keys = mask.shape
        return (
            batch in (1, x.shape[0])
            and heads in (1, self.plan.heads)
            and queries in (1, x.shape[1])
            and keys == x.shape[1]
        )


Children = list[tuple[nn.Module, list[nn.Module | None]]]


def children(blocks: Sequence[nn.Module]) -> Children:
    """Each module in the blocks, and its children."""
    return [(module, [*module._modules.values()]) for block in blocks for module in block.modules()]


def untouched(inside: Children) -> bool:
    """Whether no module was exchanged, trains, or is watched; asked at each call."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return False
    for module, before in inside:
        if module.training or "forward" in module.__dict__:
            return False
        if (module._forward_hooks or module._forward_pre_hooks) and is_watched(module):
            return False
        if [*module._modules.values()] != before:
            return False
    return True


class _Strayed(Exception):
    """A block is called otherwise than after the one before it."""


class _Run:
    """One call of a holder, for one of its chains: how many blocks have been called, and what the chain has given."""

    def __init__(self, chain: Chain):
        self.chain, self.at, self.off = chain, 0, False
        self.value: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def passes(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block gives, or None where it has to run itself."""
        if self.off:
            return None
        read = self.chain.read(args, kwargs)
        if self.at == 0:
            self.off = place != 0 or read is None or not self._starts(*read)
        elif place != self.at or read is None or read[0] is not self.value or read[1] is not self.mask:
            raise _Strayed
        if self.off:
            return None
        self.at += 1
        length = self.chain.plan.form.given
        return (self.value, *[None] * (length - 1)) if length else self.value

    def _starts(self, x: Any, mask: Any) -> bool:
        if not self.chain.fits(x, mask) or not untouched(self.chain.inside):
            return False
        parts = self.chain.tensors()
        if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in parts)):
            return False
        self.value, self.mask = self.chain.call(x, mask, parts), mask
        return True

    def is_right(self, output: Any) -> bool:
        """Whether the holder went through all blocks and keeps nothing of what stood between them."""
        if self.at == 0:
            return True
        shown = sum(leaf is self.value for leaf in leaves(output))
        return self.at == len(self.chain.blocks) and shown <= self.chain.plan.shown


def leaves(output: Any) -> Iterator[Any]:
    """What stands in nested tuples, lists and mappings."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for inner in output:
            yield from leaves(inner)
    else:
        yield output


class _Open(threading.local):
    """The runs of the holder that is at work in this thread."""

    runs: Sequence[_Run] = ()


class _OpenInTrace:
    """The same while torch.compile or torch.export traces, which know no threads."""

    runs: Sequence[_Run] = ()


_open, _open_in_trace = _Open(), _OpenInTrace()


def _opened() -> Any:
    return _open_in_trace if torch.compiler.is_compiling() else _open


class Swapped:
    """Comes before the class of a module; what is not known here runs there."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, plain = type(self).__bases__
        return _blank, (kind, plain), self.__dict__


class _Holder(Swapped):
    chains: list[Chain]

    def through(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        opened = _opened()
        before, runs = opened.runs, [_Run(chain) for chain in self.chains]
        opened.runs = runs
        try:
            output = plain(self, *args, **kwargs)
            right = all(run.is_right(output) for run in runs)
        except _Strayed:
            right = False
        finally:
            opened.runs = before
        return output if right else plain(self, *args, **kwargs)


class _Link(Swapped):
    chain_place: tuple[int, int]
    """Which of the holder's chains, and which of its blocks."""

    def through(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chain, place = self.chain_place
        runs = _opened().runs
        output = None
        if chain < len(runs) and place < len(runs[chain].chain.blocks) and runs[chain].chain.blocks[place] is self:
            output = runs[chain].passes(place, args, kwargs)
        return plain(self, *args, **kwargs) if output is None else output


@cache
def swapped(kind: Any, plain: Any) -> Any:
    """A class that is as `plain` to all who look, transformers among them, but for its forward."""

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.through(self, plain.forward, args, kwargs)

    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (kind, plain), {**names, "forward": forward})


def _blank(kind: Any, plain: Any) -> Any:
    """For copy and pickle, which find no class that was made here by its name."""
    return object.__new__(swapped(kind, plain))


def use_chains(holder: nn.Module, plans: Sequence[ChainProgram]) -> None:
    """Let blocks run as chains from now on, wherever they can.

    Raises:
        AttributeError, ValueError: when the holder does not hold what a plan names, or steps do not fit together.
    """
    chains = [Chain(holder, plan) for plan in plans]
    for chain in chains:
        chain.call(torch.zeros(1, 0, chain.plan.width), None, chain.tensors())
    for number, chain in enumerate(chains):
        for place, block in enumerate(chain.blocks):
            plain: Any = type(block)
            block.__class__ = swapped(_Link, plain)
            block.chain_place = (number, place)
    plain = type(holder)
    holder.__class__ = swapped(_Holder, plain)
    holder.chains = chains


def chains_of(model: nn.Module) -> dict[str, list[ChainProgram]]:
    """The holders in a model by path, and their chains."""
    return {path: [c.plan for c in m.chains] for path, m in model.named_modules() if isinstance(m, _Holder)}
