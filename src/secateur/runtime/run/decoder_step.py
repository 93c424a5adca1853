"""Blocks of a decoder that compute one token of each sequence in two calls of the kernels, before and after its keys
and values go into the cache, where transformers runs some hundred operations of torch. Other calls run as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from secateur.kernels.format import ACTIVATIONS, ATTENTION, GATE, LINEAR, NORM, ROTARY
from secateur.kernels.native import load_native
from secateur.kernels.steps import NONE, Op, rows_written, step_from_json, table, three_reads, vector_length
from secateur.runtime.layers.hooks import children, untouched
from secateur.runtime.layers.linear import ByTokens, SparseLinear, layer_shape
from secateur.runtime.layers.operators import activated, is_eager, mask_of
from secateur.runtime.layers.packed import checked_vector
from secateur.runtime.layers.swap_class import Swapped, swap_class
from secateur.runtime.program.find_decoder_steps import CACHE, IGNORED, LAYER_INDEX, DecoderSignature

NOTHING_CACHED = (0, 0, 0, (0, 0, 0), (0, 0, 0), 0, 0, (0, 0, 0))
"""The cache and mask arguments of the native `Token.run` before the token is in the cache."""


@dataclass(frozen=True)
class DecoderProgram:
    """What a block computes. Field names are keys of runtime.json in saved folders.

    - `form`: how the block is called
    - `steps`: its steps; weights and vectors are paths inside the block
    - `attention`: the path of the module that has the `LAYER_INDEX`, inside the block
    - `width`: the numbers of a token
    """

    form: DecoderSignature
    steps: tuple[Op, ...]
    attention: str
    width: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderProgram:
        """Read a program that `dataclasses.asdict` has written.

        Raises:
            TypeError, KeyError, AttributeError: when the data is not a program.
        """
        form = DecoderSignature(**{**data["form"], "names": tuple(data["form"]["names"])})
        return cls(form, tuple(map(step_from_json, data["steps"])), data["attention"], data["width"])


@dataclass
class TokenInputs:
    """The arguments that come with a token; a batch or heads of 1 stand for all.

    - `mask`: the mask of attention (batch, heads, 1, keys), or None
    - `rotary`: cosines and sines (batch, 1, width), or None
    - `cache`: transformers' cache of keys and values
    """

    mask: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    cache: Any


class DecoderRunner:
    """A program on the modules of a block.

    Raises:
        AttributeError: when the block lacks a module or tensor of the program.
        ValueError: when the steps do not fit together.
    """

    def __init__(self, block: nn.Module, program: DecoderProgram):
        self.block, self.program = block, program
        self.heads = _checked(program)
        self.steps = _joined(program.steps)
        self.inside = children([block])
        self.attention = block.get_submodule(program.attention)
        if not isinstance(getattr(self.attention, LAYER_INDEX, None), int):
            raise AttributeError(f"{program.attention} has no {LAYER_INDEX}")
        self.attends_by = self._attends_by()
        self._prepared: dict[int, _Prepared] = {}
        self.prepare(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}  # it holds addresses

    def prepared(self, batch: int) -> _Prepared | None:
        """The steps for so many tokens; None where weights were exchanged for others that the kernels do not take."""
        try:
            return self.prepare(batch)
        except (AttributeError, ValueError):
            return None

    def prepare(self, batch: int) -> _Prepared:
        """The steps for so many tokens.

        Raises:
            AttributeError, ValueError: as the class, for the tensors that the block holds in this call.
        """
        prepared = self._prepared.get(batch)
        if prepared is None or not prepared.is_current():
            if prepared is not None:
                self._prepared.clear()  # those of other batches may hold tensors that are gone from the block
            prepared = self._prepared[batch] = _Prepared(self.block, self.steps, self.program.width, batch)
        return prepared

    def _attends_by(self) -> tuple[Any, Any]:
        """The function and the factor with which transformers' attention would compute."""
        config = getattr(self.attention, "config", None)
        name = None if config is None else vars(config).get("_attn_implementation_internal")
        return name, getattr(self.attention, "scaling", None)

    def run(self, x: torch.Tensor, inputs: TokenInputs, prepared: _Prepared) -> torch.Tensor:
        """The output of the block for x (batch, 1, width), with the steps prepared for the batch."""
        batch = x.shape[0]
        values = x.new_empty(batch * prepared.floats)
        cos, sin, stride = 0, 0, 0
        if inputs.rotary is not None:
            cos, sin = inputs.rotary[0].data_ptr(), inputs.rotary[1].data_ptr()
            stride = inputs.rotary[0].stride(0) if inputs.rotary[0].shape[0] > 1 else 0
        cached: tuple[Any, ...] = NOTHING_CACHED
        keep: Any = None  # keys, values and mask live until the kernels have run
        for begin, end in prepared.stretches:
            step = self.steps[begin]
            if step.kind == ATTENTION:
                cached, keep = self._cached(step, values, prepared, inputs, batch)
            elif prepared.layers[begin] is not None:
                prepared.compute(begin, step, x, values, batch)
                continue
            prepared.token.run(
                begin, end, batch, x.data_ptr(), values.data_ptr(), cos, sin, stride, *cached, torch.get_num_threads()
            )
        del keep
        return prepared.value(len(self.steps), x, values, batch).unsqueeze(1)

    def _cached(
        self, step: Op, values: torch.Tensor, prepared: _Prepared, inputs: TokenInputs, batch: int
    ) -> tuple[tuple[Any, ...], Any]:
        """Put the keys and values of the token into the cache.

        Returns the cache and mask arguments of the native `Token.run`, and the tensors that have to live until it has
        run.
        """
        heads, kv_heads, width = step.heads
        size = (batch, kv_heads, 1, width)
        stride = (kv_heads * width, width, kv_heads * width, 1)
        key, value = (values.as_strided(size, stride, prepared.first(read, batch)) for read in step.reads[1:])
        all_keys, all_values = inputs.cache.update(key, value, getattr(self.attention, LAYER_INDEX))
        count = all_keys.shape[2]
        if all_keys.shape != (batch, kv_heads, count, width) or all_values.shape != all_keys.shape:
            raise ValueError(f"the cache gives keys {tuple(all_keys.shape)} and values {tuple(all_values.shape)}")
        if all_keys.dtype is not torch.float32 or all_values.dtype is not torch.float32:
            raise TypeError(f"packed layers want a cache in float32, not {all_keys.dtype}")
        all_keys, all_values = (t if t.stride(3) == 1 else t.contiguous() for t in (all_keys, all_values))
        if inputs.mask is not None and inputs.mask.shape[3] not in (1, count):
            raise ValueError(f"the mask is of {inputs.mask.shape[3]} keys, but the cache holds {count}")
        mask, added, kept, strides = mask_of(inputs.mask, (batch, heads, 1, count))
        arguments = (
            all_keys.data_ptr(),
            all_values.data_ptr(),
            count,
            all_keys.stride()[:3],
            all_values.stride()[:3],
            added,
            kept,
            strides,
        )
        return arguments, (all_keys, all_values, mask)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, TokenInputs] | None:
        """The token and its inputs in the arguments of a block; None where the kernels cannot compute the call."""
        form = self.program.form
        inputs = {**dict(zip(form.names, args, strict=False)), **kwargs}
        x, mask, rotary = inputs.pop(form.x, None), inputs.pop(form.mask, None), inputs.pop(form.turns, None)
        cache = inputs.pop(CACHE, None)
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.program.width:
            return None
        if x.dtype is not torch.float32 or x.device.type != "cpu" or cache is None or not x.is_contiguous():
            return None
        if any(value is not None and value is not False and name not in IGNORED for name, value in inputs.items()):
            return None
        if not self._is_mask(mask, x.shape[0]) or not self._is_rotary(rotary, x.shape[0]):
            return None
        if torch.is_grad_enabled() and self._needs_gradient(x, mask, *(rotary or ())):
            return None
        return None if self._attends_by() != self.attends_by else (x, TokenInputs(mask, rotary, cache))

    def _needs_gradient(self, *tensors: torch.Tensor | None) -> bool:
        return any(t is not None and t.requires_grad for t in tensors) or any(
            p.requires_grad for p in self.block.parameters()
        )

    def _is_mask(self, mask: Any, batch: int) -> bool:
        if mask is None:
            return True
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.dtype not in (torch.float32, torch.bool):
            return False
        shape = mask.shape
        return shape[0] in (1, batch) and shape[1] in (1, self.heads[0]) and shape[2] == 1

    def _is_rotary(self, rotary: Any, batch: int) -> bool:
        """Whether an argument is a pair of cosines and sines, where the block reads one."""
        if not self.program.form.turns:
            return rotary is None
        return (
            isinstance(rotary, tuple)
            and len(rotary) == 2
            and isinstance(rotary[0], torch.Tensor)
            and isinstance(rotary[1], torch.Tensor)
            and rotary[0].shape == rotary[1].shape
            and rotary[0].shape[0] in (1, batch)
            and rotary[0].shape[1:] == (1, self.heads[2])
            and all(angles.dtype is torch.float32 and angles.is_contiguous() for angles in rotary)
        )


class _Prepared:
    """The steps of a block for so many tokens at a time, with the weights at their addresses.

    - `layers`: for each step the layer that torch computes, or None
    - `rows`: the numbers of a token in each value
    - `firsts`: where each value begins, for one token
    - `stretches`: (begin, end) of steps that run in one call
    - `parts`: the tensors of the steps: the table that holds each, its name there, and the tensor
    - `addresses`: the addresses of these tensors
    """

    def __init__(self, block: nn.Module, steps: Sequence[Op], width: int, batch: int):
        native: Any = load_native()
        self.parts: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self.addresses: list[int] = []
        self.layers = [_dense(block, step, batch) for step in steps]
        located = [_located(block, step, layer, batch) for step, layer in zip(steps, self.layers, strict=True)]
        rows, numbers = table(located, self._locate)
        sizes = [tensor.nbytes for _, _, tensor in self.parts]
        self.token = native.Token(rows.ctypes.data, numbers.ctypes.data, len(rows), width, self.addresses, sizes)
        self.floats: int = self.token.floats
        self.rows = [width]
        for step, dense in zip(located, self.layers, strict=True):
            layer = step.weight[0] if step.weight else dense
            self.rows.append(rows_written(step, self.rows, None if layer is None else layer_shape(layer)))
            for module, name in filter(None, (step.bias, step.scale, step.shift)):
                checked_vector(getattr(module, name), vector_length(step, self.rows[-1]), name)
        if sum(self.rows[1:]) != self.floats:
            raise ValueError("a packed weight has other rows than its layer says")
        self.firsts = [0, *accumulate(self.rows[1:], initial=0)]
        self.stretches = list(_stretches(steps, self.layers))

    def _locate(self, part: tuple[nn.Module, str]) -> tuple[int, int]:
        """Add a tensor of a module to the parts; its index, and its bytes."""
        module, name = part
        tensors: Any = module._buffers if name in module._buffers else module._parameters
        tensor = tensors.get(name)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            raise AttributeError(f"{type(module).__name__} has no {name}")
        if tensor.dtype not in (torch.uint8, torch.float32) or tensor.device.type != "cpu":
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}")
        self.parts.append((tensors, name, tensor))
        self.addresses.append(tensor.data_ptr())
        return len(self.parts) - 1, tensor.nbytes

    def is_current(self) -> bool:
        """Whether the modules still hold the same tensors, at the same addresses."""
        return all(
            tensor.data_ptr() == address and tensors.get(name) is tensor
            for (tensors, name, tensor), address in zip(self.parts, self.addresses, strict=True)
        )

    def first(self, value: int, batch: int) -> int:
        """The index of the first number of a value."""
        return self.firsts[value] * batch

    def value(self, number: int, x: torch.Tensor, values: torch.Tensor, batch: int) -> torch.Tensor:
        """A value (batch, rows)."""
        if number == 0:
            return x.view(batch, -1)
        rows = self.rows[number]
        return values.as_strided((batch, rows), (rows, 1), self.first(number, batch))

    def compute(self, number: int, step: Op, x: torch.Tensor, values: torch.Tensor, batch: int) -> None:
        """Compute a step with torch."""
        first, gate, residual = (None if v == NONE else self.value(v, x, values, batch) for v in three_reads(step))
        y = activated(self.layers[number](first), step.activation)
        y = y if gate is None else y * gate
        self.value(number + 1, x, values, batch).copy_(y if residual is None else y + residual)


def _checked(program: DecoderProgram) -> tuple[int, int, int]:
    """The heads of attention in a program.

    Raises:
        ValueError: when the steps do not fit together.
    """
    attends = [step for step in program.steps if step.kind == ATTENTION]
    if len(attends) != 1:
        raise ValueError(f"a block has one attention, not {len(attends)}")
    if any(len(step.heads) != 3 or not 0 <= min(step.heads) <= max(step.heads) < 1 << 31 for step in program.steps):
        raise ValueError("heads are three numbers")
    heads = attends[0].heads
    if any(step.kind == ROTARY and step.heads[2] != heads[2] for step in program.steps):
        raise ValueError("rotary heads have another width than those of attention")
    if any(step.kind == NORM and step.number < 0 for step in program.steps):
        raise ValueError("the epsilon of a norm is negative")
    if any(not 0 <= step.activation < len(ACTIVATIONS) for step in program.steps):
        raise ValueError("there is an unknown activation")
    if len(attends[0].reads) != 3 or min(attends[0].reads) < 1:
        raise ValueError("attention reads queries, keys and values that steps have written")
    if any(step.kind == ROTARY for step in program.steps) and not program.form.turns:
        raise ValueError("the block has rotary steps, but is called without cosines and sines")
    if program.form.given not in range(8):
        raise ValueError(f"a block gives {program.form.given!r}")
    return heads


def _dense(block: nn.Module, step: Op, batch: int) -> Any:
    """The layer of a step where it is not packed, else None."""
    if step.kind != LINEAR:
        return None
    layer = _layer(block, step, batch)
    if isinstance(layer, SparseLinear):
        return None
    sizes, weight = layer_shape(layer), getattr(layer, "weight", None)
    if not all(isinstance(size, int) for size in sizes) or (type(layer) is nn.Linear and weight.shape != sizes):
        raise ValueError(f"{step.weight} belongs to no linear layer")
    return layer


def _layer(block: nn.Module, step: Op, batch: int) -> nn.Module:
    layer = block.get_submodule(step.weight.removesuffix(".packed"))
    return layer.layer_for_tokens(batch) if isinstance(layer, ByTokens) else layer


def _located(block: nn.Module, step: Op, layer: Any, batch: int) -> Op:
    """A step with modules and names of their tensors instead of paths; of a layer that torch computes, its rows."""
    if layer is not None:
        return replace(step, weight=None, bias=None, rows=layer.out_features)
    if step.kind == LINEAR:
        packed = _layer(block, step, batch)
        bias = None if step.bias is None else (packed, "bias")
        return replace(step, weight=(packed, "packed"), bias=bias)
    scale, shift = (_module_and_name(block, path) for path in (step.scale, step.shift))
    return replace(step, scale=scale, shift=shift)


def _module_and_name(block: nn.Module, path: str | None) -> tuple[nn.Module, str] | None:
    """The module that holds a tensor, and its name there."""
    if path is None:
        return None
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name


def _stretches(steps: Sequence[Op], layers: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(begin, end) of steps that run in one call: attention begins a stretch, and a layer that torch computes is a
    stretch by itself."""
    begin = 0
    for number, step in enumerate(steps):
        if number > begin and (step.kind == ATTENTION or layers[number] is not None or layers[number - 1] is not None):
            yield begin, number
            begin = number
    yield begin, len(steps)


def _joined(steps: Sequence[Op]) -> list[Op]:
    """The steps, with a gate or sum joined to the layer before it, if it alone reads the layer's output.

    The layer then reads the other factor as its second input, or the other summand as its third.
    """
    readers = Counter(value for step in steps for value in step.reads)
    joined: list[Op] = []
    new_number = {NONE: NONE, 0: 0}
    for value, step in enumerate(steps):  # `value` is the output of the step before
        reads = [new_number[read] for read in step.reads]
        if value in step.reads and readers[value] == 1 and _takes(joined[-1:], step):
            (other,) = [read for read in reads if read != len(joined)]
            extra = [other] if step.kind == GATE else [NONE, other]
            joined[-1] = replace(joined[-1], reads=[*joined[-1].reads, *extra])
        else:
            joined.append(replace(step, reads=reads))
        new_number[value + 1] = len(joined)
    return joined


def _takes(before: Sequence[Op], step: Op) -> bool:
    """Whether the last step before is a layer, with nothing joined to it, and a step is a gate or a sum."""
    is_sum = step.kind == NORM and not step.norm and step.reads[1] != NONE
    return (step.kind == GATE or is_sum) and any(op.kind == LINEAR and len(op.reads) == 1 for op in before)


class _Decoder(Swapped):
    runner: DecoderRunner

    def through(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runner = self.runner
        read = None if torch.compiler.is_compiling() else runner.read(args, kwargs)
        if read is None or not is_eager(read[0]) or not untouched(runner.inside):
            return plain(self, *args, **kwargs)
        prepared = runner.prepared(read[0].shape[0])
        if prepared is None:
            return plain(self, *args, **kwargs)
        output, length = runner.run(*read, prepared), runner.program.form.given
        return (output, *[None] * (length - 1)) if length else output


def use_decoders(model: nn.Module, programs: Mapping[str, DecoderProgram]) -> None:
    """Let blocks of a model, by path, compute one token at a time in one go from now on, wherever they can.

    Raises:
        AttributeError: when a block lacks a module or tensor of its program.
        ValueError: when the steps of a program do not fit together.
    """
    runners = [DecoderRunner(model.get_submodule(path), program) for path, program in programs.items()]
    for runner in runners:
        block: Any = runner.block
        swap_class(block, _Decoder)
        block.runner = runner


def decoders_of(model: nn.Module) -> dict[str, DecoderProgram]:
    """The blocks of a model that compute one token at a time in one go, by path."""
    return {path: module.runner.program for path, module in model.named_modules() if isinstance(module, _Decoder)}
