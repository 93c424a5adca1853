"""Blocks of a model that follow one another run as one call of the kernels, where they are called as they were traced.

The module that goes through the blocks (their holder) opens a run. Its first block computes the whole chain, and the
other blocks return what they are called with. Calls that differ from the trace (training, gradients, hooks, other
arguments, another order, a stream that somebody keeps) run layer by layer, if need be by calling the holder's own
forward again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.kernels.format import LINEAR, NORM
from secateur.kernels.steps import Op, rows_written, step_from_json, table, vector_length
from secateur.runtime.layers.hooks import children, untouched
from secateur.runtime.layers.linear import SparseLinear, layer_shape
from secateur.runtime.layers.operators import run, sparse_chain
from secateur.runtime.layers.packed import checked_vector
from secateur.runtime.layers.swap_class import Swapped, swap_class
from secateur.runtime.program.find_chains import BlockSignature
from secateur.torch.stats.attention_scores import KNOWN


@dataclass(frozen=True)
class ChainProgram:
    """What a chain computes, with paths inside the holder. Field names are keys of runtime.json in saved folders.

    - `blocks`: the paths of its blocks
    - `form`: how a block is called
    - `steps`: the steps of all blocks
    - `heads`: the query heads of every attention
    - `width`, `rows`: the numbers of a token that it reads, and that it returns
    - `without_mask`: whether attention sees all keys in a call without a mask
    - `shown`: how often the chain's output stands in the output of the holder
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
        """Read a program that `dataclasses.asdict` has written.

        Raises:
            TypeError, KeyError, AttributeError: when the data is not a program.
        """
        form: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data["form"].items()}
        steps = tuple(map(step_from_json, data["steps"]))
        return cls(**{**data, "blocks": tuple(data["blocks"]), "form": BlockSignature(**form), "steps": steps})


class Chain:
    """A program on the modules of a holder.

    Raises:
        AttributeError: when the holder lacks a block or tensor of the program.
        ValueError: when a step names something else than the weight of a packed layer or a vector of the right length.
    """

    def __init__(self, holder: nn.Module, program: ChainProgram):
        _check(holder, program)
        self.program = program
        self.blocks = [holder.get_submodule(path) for path in program.blocks]
        self.parts: list[tuple[nn.Module, str]] = []
        self.inside = children(self.blocks)

        def locate(path: str) -> tuple[int, int]:
            parent, _, name = path.rpartition(".")
            self.parts.append((holder.get_submodule(parent), name))
            return len(self.parts) - 1, getattr(*self.parts[-1]).nbytes

        steps, numbers = table(program.steps, locate)
        self.steps, self.numbers = torch.from_numpy(steps), torch.from_numpy(numbers)
        signature = program.form
        optional = {
            name for name, value in signature.constants.items() if value is None or (value is False and name in KNOWN)
        }
        self.needed = {signature.x, *signature.tensors, *signature.constants} - optional

    def tensors(self) -> list[torch.Tensor]:
        """The weights and vectors of the steps as the modules hold them in this call."""
        if torch.compiler.is_compiling():
            return [getattr(module, name) for module, name in self.parts]
        # Attributes of modules are slow: a tenth of a millisecond for six blocks.
        return [(m._buffers if name in m._buffers else m._parameters)[name] for m, name in self.parts]

    def call(self, x: torch.Tensor, mask: torch.Tensor | None, parts: list[torch.Tensor]) -> torch.Tensor:
        """The output of the last block for the input of the first."""
        return run(sparse_chain, x, mask, parts, self.steps, self.numbers, self.program.heads, self.program.rows)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The stream and the mask in the arguments of a block; None where other arguments differ from the trace."""
        signature = self.program.form
        inputs = {**dict(zip(signature.names, args, strict=False)), **kwargs}
        if len(inputs) != len(args) + len(kwargs) or not inputs.keys() >= self.needed:
            return None
        for name, value in inputs.items():
            if name in (signature.x, signature.mask):
                continue
            if name in signature.tensors:
                is_known = isinstance(value, torch.Tensor)
            elif name in signature.constants:
                constant = signature.constants[name]
                is_known = type(value) is type(constant) and value == constant
            else:
                is_known = value is None or (value is False and name in KNOWN)
            if not is_known:
                return None
        return inputs[signature.x], inputs.get(signature.mask)

    def fits(self, x: Any, mask: Any) -> bool:
        """Whether the kernels can compute such a stream and mask."""
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if x.shape[2] != self.program.width:
            return False
        if mask is None:
            return self.program.without_mask
        if not self.program.form.mask or not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return False
        if mask.dtype not in (torch.float32, torch.bool) or mask.device.type != "cpu" or mask.requires_grad:
            return False
        batch, heads, queries, keys = mask.shape
        return (
            batch in (1, x.shape[0])
            and heads in (1, self.program.heads)
            and queries in (1, x.shape[1])
            and keys == x.shape[1]
        )


def _check(holder: nn.Module, program: ChainProgram) -> None:
    """Check what the steps of a program name. Of the layers, `SparseLinear` has validated the weights."""
    if len(set(program.blocks)) != len(program.blocks) or "" in program.blocks:
        raise ValueError("a chain names a block twice, or its holder")
    rows = [program.width]
    for step in program.steps:
        layer = None
        if step.kind == NORM and step.number < 0:
            raise ValueError(f"the epsilon of a norm is {step.number}")
        if step.kind == LINEAR:
            path, _, name = str(step.weight).rpartition(".")
            layer = holder.get_submodule(path)
            if not isinstance(layer, SparseLinear) or name != "packed":
                raise ValueError(f"{step.weight} is no packed weight")
        rows.append(rows_written(step, rows, layer_shape(layer) if layer else None))
        for path in filter(None, (step.bias, step.scale, step.shift)):
            parent, _, name = path.rpartition(".")
            checked_vector(getattr(holder.get_submodule(parent), name), vector_length(step, rows[-1]), path)


class _Strayed(Exception):
    """A block is called in another order or with another input than the chain expects."""


class _Run:
    """One call of a holder, for one of its chains.

    - `at`: how many blocks have been called
    - `off`: the blocks run layer by layer
    - `value`: the output of the chain
    - `mask`: the mask that the first block was called with
    """

    def __init__(self, chain: Chain):
        self.chain, self.at, self.off = chain, 0, False
        self.value: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def passes(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a block, by its number in the chain; None where the block has to run itself."""
        if self.off:
            return None
        read = self.chain.read(args, kwargs)
        if self.at == 0:
            self.off = number != 0 or read is None or not self._starts(*read)
        elif number != self.at or read is None or read[0] is not self.value or read[1] is not self.mask:
            raise _Strayed
        if self.off:
            return None
        self.at += 1
        length = self.chain.program.form.given
        return (self.value, *[None] * (length - 1)) if length else self.value

    def _starts(self, x: Any, mask: Any) -> bool:
        """Compute the chain, if the kernels can."""
        if not self.chain.fits(x, mask) or not untouched(self.chain.inside):
            return False
        parts = self.chain.tensors()
        if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in parts)):
            return False
        self.value, self.mask = self.chain.call(x, mask, parts), mask
        return True

    def is_right(self, output: Any) -> bool:
        """Whether the holder went through all blocks and returns no stream from between them."""
        if self.at == 0:
            return True
        shown = sum(leaf is self.value for leaf in leaves(output))
        return self.at == len(self.chain.blocks) and shown <= self.chain.program.shown


def leaves(output: Any) -> Iterator[Any]:
    """The items of nested tuples, lists and mappings."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for inner in output:
            yield from leaves(inner)
    else:
        yield output


class _OpenRuns(threading.local):
    """The runs of the holder whose forward is running in this thread."""

    runs: Sequence[_Run] = ()


class _OpenRunsInTrace:
    """The runs of the holder while torch.compile or torch.export traces, which know no threads."""

    runs: Sequence[_Run] = ()


_open, _open_in_trace = _OpenRuns(), _OpenRunsInTrace()


def _opened() -> Any:
    return _open_in_trace if torch.compiler.is_compiling() else _open


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
    """The number of the chain in the holder, and of the block in the chain."""

    def through(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chain, number = self.chain_place
        runs = _opened().runs
        output = None
        if chain < len(runs) and number < len(runs[chain].chain.blocks) and runs[chain].chain.blocks[number] is self:
            output = runs[chain].passes(number, args, kwargs)
        return plain(self, *args, **kwargs) if output is None else output


def use_chains(holder: nn.Module, programs: Sequence[ChainProgram]) -> None:
    """Let blocks run as chains from now on, wherever they can.

    Raises:
        AttributeError: when the holder lacks a block or tensor of a program.
        ValueError: when the steps of a program do not fit together.
    """
    chains = [Chain(holder, program) for program in programs]
    for chain in chains:
        chain.call(torch.zeros(1, 0, chain.program.width), None, chain.tensors())
    block: Any
    blocks = [id(block) for chain in chains for block in chain.blocks]
    if len(set(blocks)) != len(blocks):
        raise ValueError("a block is in two chains")
    for number, chain in enumerate(chains):
        for place, block in enumerate(chain.blocks):
            swap_class(block, _Link)
            block.chain_place = (number, place)
    swapped: Any = holder
    swap_class(swapped, _Holder)
    swapped.chains = chains


def chains_of(model: nn.Module) -> dict[str, list[ChainProgram]]:
    """The holders in a model by path, and the programs of their chains."""
    return {path: [c.program for c in m.chains] for path, m in model.named_modules() if isinstance(m, _Holder)}
